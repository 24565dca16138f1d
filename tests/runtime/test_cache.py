"""Committing: after every possible partial acceptance the cache holds what plain decoding would have written."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from headstart.runtime.bundle import Bundle, CacheInfo
from headstart.runtime.cache import KVCache
from headstart.runtime.engines.onnxruntime import OnnxRuntimeEngine
from headstart.runtime.prefill import prefill
from headstart.runtime.tree import ROOT, DraftTree

INFOS = (CacheInfo("key_cache.0", "value_cache.0", 2, 3, 5),)


@pytest.mark.parametrize("kept", [c for n in range(1, 5) for c in itertools.combinations(range(4), n)])
def test_commit_keeps_chosen_rows_in_order(kept: tuple[int, ...]) -> None:
    cache = KVCache(INFOS, batch=2, slots=12, dtype="float32")
    cache.lengths[:] = [3, 5]
    for buffer in cache.buffers:
        buffer[:] = np.arange(12, dtype=np.float32)[None, None, :, None]
    cache.commit(1, kept)
    wanted = [0, 1, 2, 3, 4, *(5 + row for row in kept)]
    for buffer in cache.buffers:
        assert buffer[1, 0, : len(wanted), 0].tolist() == wanted
        assert buffer[0, 0, :, 0].tolist() == list(range(12)), "another sequence was touched"
    assert cache.lengths.tolist() == [3, len(wanted)]


def test_row_shares_memory_and_length() -> None:
    cache = KVCache(INFOS, batch=3, slots=4, dtype="float32")
    row = cache.row(1)
    row.buffers[0][:] = 7
    row.commit(0, [0])
    assert cache.lengths.tolist() == [0, 1, 0]
    assert cache.buffers[0][1].min() == 7 and cache.buffers[0][0].max() == 0


@pytest.mark.parametrize("rows", [(0, 1, 2), (0, 0, 0), (2, 0, 1), (1, 1, 0)])
def test_gather_moves_whole_sequences(rows: tuple[int, ...]) -> None:
    cache = KVCache(INFOS, batch=3, slots=6, dtype="float32")
    cache.lengths[:] = [2, 5, 3]
    for buffer in cache.buffers:
        buffer[:] = np.arange(3, dtype=np.float32)[:, None, None, None]
    memory = [buffer.ctypes.data for buffer in cache.buffers]
    cache.gather(rows)
    assert cache.lengths.tolist() == [[2, 5, 3][row] for row in rows]
    for buffer in cache.buffers:
        for i, row in enumerate(rows):
            assert (buffer[i, :, : cache.lengths[i]] == row).all()
    assert memory == [buffer.ctypes.data for buffer in cache.buffers], "bound buffers stay where they are"


def paths_of(tree: DraftTree) -> list[list[int]]:
    """Every path from the root, the empty one included, as lists of nodes."""
    paths: list[list[int]] = [[]]
    for node in range(len(tree)):
        path, above = [node], int(tree.parents[node])
        while above != ROOT:
            path.insert(0, above)
            above = int(tree.parents[above])
        paths.append(path)
    return paths


def test_decoding_goes_on_after_every_partial_acceptance(bundle_of: Callable[[str], Bundle]) -> None:
    """Verify a tree, commit each of its paths in turn, and decode on: logits equal those of the path decoded plainly."""
    engine = OnnxRuntimeEngine(bundle_of("llama"))
    generator = np.random.default_rng(0)
    prompt = generator.integers(3, 300, 15).tolist()
    tree = DraftTree(generator.integers(3, 300, 7), np.array([ROOT, ROOT, 0, 0, 1, 3, 5]), np.zeros(7, np.float32))
    for path in paths_of(tree):
        cache = engine.new_cache(1, 64)
        prefill(engine, cache, prompt[:-1])
        rows = np.arange(len(tree) + 1)[None]
        positions = len(prompt) - 1 + tree.depths()[None]
        engine.forward(cache, np.array([[prompt[-1], *tree.token_ids]]), positions, tree.ancestor_mask()[None], rows)
        cache.commit(0, [0, *(node + 1 for node in path)])
        after = prefill(engine, cache, [42]).logits[0, 0].copy()
        plain = prefill(engine, engine.new_cache(1, 64), [*prompt, *(int(tree.token_ids[n]) for n in path), 42]).logits[0, 0]
        assert np.abs(after - plain).max() < 1e-4 * (plain.max() - plain.min())

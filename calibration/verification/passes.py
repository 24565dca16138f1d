"""Forwards as decoding runs them (prefill in chunks, trees, commits, batches): the part of `verify` that calls engines."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.drafters.recurrent import RootInput
from headstart.runtime.graph import MAX_ROWS, Engine
from headstart.runtime.prefill import last_logits, prefill, run_decoder
from headstart.runtime.states import CrossState
from headstart.runtime.tree import ROOT, DraftTree

Logits = NDArray[np.float32]
Source = NDArray[Any] | None  # what the encoder reads, None without one


class Decoding:
    """B sequences decoded together by one engine, over the same or no source."""

    def __init__(self, engine: Engine, batch: int, slots: int, source: Source = None) -> None:
        self._engine = engine
        self._state = engine.graph("decoder").new_state(batch, slots, encoded(engine, source, batch))

    def prefill(self, row: int, token_ids: Sequence[int], chunk: int = MAX_ROWS) -> Logits:
        """Write and commit tokens of one sequence, `chunk` per pass; returns [T, V] logits of all of them."""
        state = self._state.row(row)
        parts = []
        for begin in range(0, len(token_ids), chunk):
            ids = np.array(token_ids[begin : begin + chunk], np.int64)[None]
            rows = np.arange(ids.shape[1])[None]
            mask = np.tri(ids.shape[1], dtype=np.bool_)[None]
            outputs = run_decoder(self._engine, state, ids, int(state.lengths[0]) + rows, mask, rows)
            parts.append(np.array(outputs[contract.LOGITS][0]))
            state.commit(0, range(ids.shape[1]))
        return np.concatenate(parts)

    def verify(self, roots: Sequence[int], trees: Sequence[DraftTree]) -> list[Logits]:
        """One forward over each sequence's root and tree: [1 + N, V] logits each; short trees are padded."""
        rows = 1 + max(map(len, trees))
        ids, depths = np.zeros((2, len(trees), rows), np.int64)
        mask = np.broadcast_to(np.eye(rows, dtype=np.bool_), (len(trees), rows, rows)).copy()
        for i, (root, tree) in enumerate(zip(roots, trees, strict=True)):
            used = len(tree) + 1
            ids[i, :used] = [root, *tree.token_ids]
            depths[i, :used] = tree.depths()
            mask[i, :used, :used] = tree.ancestor_mask()
        chosen = np.broadcast_to(np.arange(rows), ids.shape)
        outputs = run_decoder(self._engine, self._state, ids, self._state.lengths[:, None] + depths, mask, chosen)
        logits = outputs[contract.LOGITS]
        return [np.array(logits[i, : len(tree) + 1]) for i, tree in enumerate(trees)]

    def last_outputs(self, token_ids: Sequence[int]) -> tuple[Logits, NDArray[np.float32]]:
        """([V] logits, [H] hidden state) of the last of these tokens, of the first sequence."""
        outputs = prefill(self._engine, self._state.row(0), token_ids)
        return last_logits(outputs), outputs.rows(contract.HIDDEN, 0, [-1])[0]

    def commit(self, row: int, kept: Sequence[int]) -> None:
        """Keep these rows of the last forward, the root's (0) first."""
        self._state.commit(row, kept)


def encoded(engine: Engine, source: Source, batch: int = 1) -> CrossState | None:
    """The source's states for each of `batch` sequences; None without a source."""
    return None if source is None else engine.encode([source]).repeated(batch)


def causal_logits(engine: Engine, texts: Sequence[Sequence[int]], source: Source = None, first: int = 0) -> list[Logits]:
    """[T - first, V] logits of the rows from `first` on of each text, all texts in one forward into empty caches.

    Neither history nor commits nor trees are involved: what all other forms of decoding are compared with.
    """
    longest = max(map(len, texts))
    ids = np.zeros((len(texts), longest), np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    rows = np.broadcast_to(np.arange(longest), ids.shape)
    mask = np.broadcast_to(np.tri(longest, dtype=np.bool_), (len(texts), longest, longest))
    state = engine.graph("decoder").new_state(len(texts), longest, encoded(engine, source, len(texts)))
    logits = run_decoder(engine, state, ids, rows, mask, rows[:, first:])[contract.LOGITS]
    return [np.array(logits[i, : len(text) - first]) for i, text in enumerate(texts)]


def last_outputs(engine: Engine, token_ids: Sequence[int], source: Source = None) -> tuple[Logits, NDArray[np.float32]]:
    """([V] logits, [H] hidden state) of the last row of a text."""
    decoding = Decoding(engine, 1, len(token_ids), source)
    return decoding.last_outputs(token_ids)


def head_outputs(engine: Engine, name: str, hidden: NDArray[np.float32], root: int) -> dict[str, NDArray[Any]]:
    """The outputs of a draft head after a [H] hidden state that decided the token `root`; none of a head that reads more."""
    graph = engine.graph(f"heads/{name}")
    known = {contract.HIDDEN: hidden[None, None], **RootInput(engine.bundle, engine.bundle.head(name)).of(np.array([root]))}
    wanted = {tensor.name for tensor in graph.info.inputs}
    if not wanted <= known.keys():
        return {}
    outputs = graph.run({tensor: known[tensor] for tensor in wanted})
    return {tensor.name: np.array(outputs[tensor.name]) for tensor in graph.info.outputs}


def paths(tree: DraftTree) -> Iterator[list[int]]:
    """For each row of a verify pass, the tokens between the root and it, its own last; the root's is empty."""
    yield []
    for node in range(len(tree)):
        path: list[int] = []
        while node != ROOT:
            path.insert(0, int(tree.token_ids[node]))
            node = int(tree.parents[node])
        yield path


def tree_logits(engine: Engine, history: Sequence[int], tree: DraftTree, source: Source = None) -> Logits:
    """[1 + N, V] logits of a tree after `history`, whose last token is the root: each row as the end of a text of its own."""
    texts = [[*history, *path] for path in paths(tree)]
    leaves = [text for text in texts if not any(other[: len(text)] == text and other != text for other in texts)]
    found: dict[tuple[int, ...], Logits] = {}
    for leaf, logits in zip(leaves, causal_logits(engine, leaves, source, len(history) - 1), strict=True):
        for length in range(len(history), len(leaf) + 1):
            found[tuple(leaf[:length])] = logits[length - len(history)]
    return np.stack([found[tuple(text)] for text in texts])

"""States: after every possible partial acceptance they are what running the accepted tokens alone would have left."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from state_graphs import FEATURES, HIDDEN, VOCAB, with_head

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, KeyValueInfo, RecurrentInfo
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.engines.ort_host import HostGraph
from headstart.runtime.errors import EngineError
from headstart.runtime.host_memory import KEPT_STATES, HostSources, RecurrentMemory, SlotMemory
from headstart.runtime.prefill import last_logits, open_state, prefill, run_decoder
from headstart.runtime.states import CrossState, GraphState
from headstart.runtime.tree import ROOT, DraftTree

BundleOf = Callable[[str], Bundle]
INFOS = (KeyValueInfo("key_cache.0", "value_cache.0", 2, 64, 128, "float32"),)
RECURRENT = (RecurrentInfo("state", (4, 8), "float32"),)
TREE = np.array([ROOT, ROOT, 0, 0, 1, 3, 5])
KINDS = {"slots": (True, False), "recurrent": (False, True), "both": (True, True)}


def slot_state(batch: int, slots: int) -> GraphState:
    memory = SlotMemory.empty(INFOS, batch, slots)
    return GraphState([memory], np.zeros(batch, np.int64), slots, slot_state)


def arrays_of(state: GraphState) -> list[NDArray[Any]]:
    return [array for part in state.parts for array in part.arrays.values()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kept", [c for n in range(1, 5) for c in itertools.combinations(range(4), n)])
def test_commit_keeps_chosen_rows_in_order(kept: tuple[int, ...]) -> None:
    state = slot_state(2, 12)
    state.lengths[:] = [3, 5]
    for array in arrays_of(state):
        array[:] = np.arange(12, dtype=np.float32)[None, None, :, None]
    state.commit(1, kept)
    wanted = [0, 1, 2, 3, 4, *(5 + row for row in kept)]
    for array in arrays_of(state):
        assert array[1, 0, : len(wanted), 0].tolist() == wanted
        assert array[0, 0, :, 0].tolist() == list(range(12)), "another sequence was touched"
    assert state.lengths.tolist() == [3, len(wanted)]


def test_views_share_memory_and_lengths() -> None:
    state = slot_state(4, 4)
    row = state.first(3).row(1)
    arrays_of(row)[0][:] = 7
    row.commit(0, [0])
    assert state.lengths.tolist() == [0, 1, 0, 0] and state.first(3).batch == 3 and row.slots == 4
    assert arrays_of(state)[0][1].min() == 7 and arrays_of(state)[0][[0, 2, 3]].max() == 0
    assert row.bound is state.bound and (row.begin, state.first(3).begin) == (1, 0)


@pytest.mark.parametrize("rows", [(0, 1, 2), (0, 0, 0), (2, 0, 1), (1, 1, 0)])
def test_gather_moves_whole_sequences(rows: tuple[int, ...]) -> None:
    state = slot_state(3, 6)
    state.lengths[:] = [2, 5, 3]
    for array in arrays_of(state):
        array[:] = np.arange(3, dtype=np.float32)[:, None, None, None]
    memory = [array.ctypes.data for array in arrays_of(state)]
    state.gather(rows)
    assert state.lengths.tolist() == [[2, 5, 3][row] for row in rows]
    for array in arrays_of(state):
        for i, row in enumerate(rows):
            assert (array[i, :, : state.lengths[i]] == row).all()
    assert memory == [array.ctypes.data for array in arrays_of(state)], "bound buffers stay where they are"


def recurrent_state(batch: int) -> tuple[GraphState, RecurrentMemory]:
    memory = RecurrentMemory.empty(RECURRENT, batch)
    state = GraphState([memory], np.zeros(batch, np.int64), 10_000, lambda batch, slots: recurrent_state(batch)[0])
    return state, memory


def returned(memory: RecurrentMemory, begin: int, rows: int) -> None:
    """As if a pass had returned the states begin, begin + 1, …; a thousand more for each sequence."""
    batch = len(memory.arrays["state"])
    values = begin + np.arange(rows)[None, :] + 1000 * np.arange(batch)[:, None]
    memory.returned({"state": np.broadcast_to(values[..., None, None], (batch, rows, 4, 8)).astype(np.float32)})


def values_of(memory: RecurrentMemory) -> list[float]:
    return [float(value) for value in memory.arrays["state"][:, 0, 0]]


def test_a_recurrent_state_is_the_last_accepted_row_s() -> None:
    state, memory = recurrent_state(2)
    returned(memory, 1, 4)
    state.commit(0, [0, 2])
    state.commit(1, [0])
    assert values_of(memory) == [3, 1001] and state.lengths.tolist() == [2, 1]
    state.row(1).commit(0, [3])
    assert values_of(memory) == [3, 1004]
    state.gather([1, 1])
    assert values_of(memory) == [1004, 1004] and state.lengths.tolist() == [2, 2]
    state.rewind(0, 1)
    assert values_of(memory) == [1001, 1004], "the other sequence keeps its own"
    state.rewind(0, 0)
    assert values_of(memory) == [0, 1004]


def test_a_recurrent_state_goes_back_as_far_as_it_is_kept() -> None:
    state, memory = recurrent_state(1)
    returned(memory, 1, 200)
    state.commit(0, range(200))
    state.rewind(0, 200 - KEPT_STATES + 1)
    assert values_of(memory) == [200 - KEPT_STATES + 1]
    with pytest.raises(EngineError, match=r"cannot go back to 100 tokens: the states of the last 64 .* Fix: rewind to 0"):
        state.rewind(0, 100)
    assert state.lengths.tolist() == [200 - KEPT_STATES + 1], "a refused rewind changes nothing"
    snapshot = state.snapshot(0)
    returned(memory, 500, 100)
    state.commit(0, range(100))
    state.restore(0, snapshot)
    assert values_of(memory) == [200 - KEPT_STATES + 1] == state.lengths.tolist()


def test_a_graph_of_no_state_has_none(bundle_of: BundleOf) -> None:
    graphs = bundle_of("t5").graphs
    assert graphs["encoder"].states == () and graphs["encoder"].reads == ()
    assert len(graphs["decoder"].slots) == len(graphs["decoder"].reads) == len(graphs["decoder"].states) == 2


def sources(lengths: list[int]) -> CrossState:
    """Keys and values [B, 2, E, 64] whose numbers are their source's."""
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    one = np.where(mask, np.arange(1, len(lengths) + 1)[:, None], 0).astype(np.float32)
    buffers = tuple(np.broadcast_to(one[:, None, :, None], (len(lengths), 2, max(lengths), 64)) for _ in range(2))
    return CrossState(("cross_key.0", "cross_value.0"), buffers, mask, np.zeros((len(lengths), max(lengths), 32)))


def test_sources_are_padded_to_the_longest() -> None:
    memory, given = HostSources(3), sources([4, 9, 6])
    memory.put(0, sources([4]))
    assert memory.arrays["encoder_mask"][1:, 0].all(), "a sequence that sees nothing would be 0/0"
    version, short = memory.version, memory.view(0, 2).bound()
    assert short["cross_key.0"].shape == (2, 2, 4, 64)
    memory.view(1, 1).put(0, given.row(1))
    assert memory.version == version + 1 and memory.arrays["encoder_mask"].sum(axis=1).tolist() == [4, 9, 1]
    memory.put(2, sources([6]))
    assert memory.version == version + 1, "there is room: what was bound stays good"
    assert memory.arrays["encoder_mask"].sum(axis=1).tolist() == [4, 9, 6]
    assert memory.arrays["cross_value.0"][:, 0, :, 0].sum(axis=1).tolist() == [4, 18, 6]
    memory.put(1, sources([2]))
    assert memory.arrays["cross_key.0"][1, 0, :, 0].tolist() == [1, 1, *[0] * 7], "nothing of the longer source is left"
    found = memory.row(0)
    assert found is not None and found.names == given.names and memory.view(2, 1).row(0) is not None


def test_a_resized_state_decodes_on_with_its_sources(bundle_of: BundleOf) -> None:
    engine, prompt = OnnxRuntimeEngine(bundle_of("t5")), [0, 5, 6, 7]
    texts = [np.arange(3, 20), np.arange(40, 49)]
    decoder, wanted = engine.graph("decoder"), []
    for text in texts:
        state = open_state(engine, 64, text)
        prefill(engine, state, prompt)
        wanted.append(last_logits(prefill(engine, state, [9])))
    small = decoder.new_state(1, 16, engine.encode(texts[:1]))
    prefill(engine, small, prompt)
    large = small.resized(3, 128)
    assert large.slots >= 128 and large.lengths.tolist() == [4, 0, 0]
    large.put_sources(1, engine.encode(texts[1:]))
    prefill(engine, large.row(1), prompt)
    for row in range(2):
        found = last_logits(prefill(engine, large.row(row), [9]))
        assert np.abs(found - wanted[row]).max() < 1e-4 * np.ptp(wanted[row])


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


def test_decoding_goes_on_after_every_partial_acceptance(bundle_of: BundleOf) -> None:
    """Verify a tree, commit each of its paths in turn, and decode on: logits equal those of the path decoded plainly."""
    engine = OnnxRuntimeEngine(bundle_of("llama"))
    decoder, generator = engine.graph("decoder"), np.random.default_rng(0)
    prompt = generator.integers(3, 300, 15).tolist()
    tree = DraftTree(generator.integers(3, 300, 7), TREE, np.zeros(7, np.float32))
    for path in paths_of(tree):
        state = decoder.new_state(1, 64)
        prefill(engine, state, prompt[:-1])
        rows = np.arange(len(tree) + 1)[None]
        positions = len(prompt) - 1 + tree.depths()[None]
        run_decoder(engine, state, np.array([[prompt[-1], *tree.token_ids]]), positions, tree.ancestor_mask()[None], rows)
        state.commit(0, [0, *(node + 1 for node in path)])
        after = last_logits(prefill(engine, state, [42]))
        text = [*prompt, *(int(tree.token_ids[node]) for node in path), 42]
        plain = last_logits(prefill(engine, decoder.new_state(1, 64), text))
        assert np.abs(after - plain).max() < 1e-4 * (plain.max() - plain.min())


@pytest.fixture(scope="module", params=list(KINDS))
def head(request: pytest.FixtureRequest, bundle_of: BundleOf, tmp_path_factory: pytest.TempPathFactory) -> HostGraph:
    """A draft head that reads features [B, T, 256] and keeps key/value slots of head size 128, a recurrent state, or both."""
    attention, recurrence = KINDS[request.param]
    bundle = with_head(bundle_of("llama"), tmp_path_factory.mktemp("head") / "bundle", "toy", attention, recurrence)
    graph = OnnxRuntimeEngine(bundle).graph("heads/toy")
    assert isinstance(graph, HostGraph)
    assert [len(graph.info.slots), len(graph.info.recurrent)] == [int(attention), int(recurrence)]
    return graph


FEATURE_ROWS = np.random.default_rng(3).standard_normal((64, HIDDEN)).astype(np.float32)


def feed(head: HostGraph, state: GraphState, rows: list[int]) -> NDArray[np.float32]:
    """Run a chain of feature rows and commit all; [n, V] logits."""
    outputs = head.run({FEATURES: FEATURE_ROWS[rows][None]}, state)
    logits: NDArray[np.float32] = outputs[contract.LOGITS][0].copy()
    state.commit(0, range(len(rows)))
    return logits


def assert_near(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    assert found.shape == wanted.shape and np.abs(found - wanted).max() < 1e-4 * np.ptp(wanted)


def test_a_head_goes_on_after_every_accepted_path(head: HostGraph) -> None:
    """Features of a root and its tree go in at once; whichever path is kept, the next rows are as if it alone had been fed."""
    tree = DraftTree(np.arange(7), TREE, np.zeros(7, np.float32))
    for path in paths_of(tree):
        state = head.new_state(1, 64)
        feed(head, state, list(range(20)))
        nodes = 20 + np.arange(8)
        outputs = head.run({FEATURES: FEATURE_ROWS[nodes][None]}, state, tree.ancestor_mask()[None])
        kept = [0, *(node + 1 for node in path)]
        tree_rows = outputs.rows(contract.HIDDEN, 0, kept)
        state.commit(0, kept)
        assert state.lengths.tolist() == [20 + len(kept)]
        alone = head.new_state(1, 64)
        feed(head, alone, list(range(20)))
        wanted = head.run({FEATURES: FEATURE_ROWS[nodes[kept]][None]}, alone)
        assert_near(tree_rows, wanted.rows(contract.HIDDEN, 0, range(len(kept))))
        alone.commit(0, range(len(kept)))
        assert_near(feed(head, state, [40, 41]), feed(head, alone, [40, 41]))


def test_a_head_goes_back_and_on(head: HostGraph) -> None:
    """Rewound, restored or resized, a state is what feeding the rows that are left would have made."""
    state = head.new_state(1, 64)
    feed(head, state, list(range(10)))
    snapshot = state.snapshot(0)
    feed(head, state, [30, 31, 32, 33])
    state.rewind(0, 12)
    alone = head.new_state(1, 64)
    feed(head, alone, [*range(10), 30, 31])
    assert_near(feed(head, state, [50]), feed(head, alone, [50]))
    state.restore(0, snapshot)
    larger = state.resized(2, 200)
    larger.gather([0, 0])
    alone = head.new_state(1, 64)
    feed(head, alone, list(range(10)))
    wanted = feed(head, alone, [51, 52, 53])
    for one in (state, larger.row(0), larger.row(1)):
        assert_near(feed(head, one, [51, 52, 53]), wanted)


def test_a_smaller_batch_of_a_head_s_state(head: HostGraph) -> None:
    """Three sequences of unequal lengths; the first two run alone in one pass, and the third is left as it was."""
    state = head.new_state(3, 64)
    histories = [[0, 1, 2], [10, 11, 12, 13, 14], [20]]
    for row, history in enumerate(histories):
        feed(head, state.row(row), history)
    two = state.first(2)
    outputs = head.run({FEATURES: FEATURE_ROWS[[[30, 31], [40, 41]]]}, two)
    found = outputs[contract.LOGITS].copy()
    assert found.shape == (2, 2, VOCAB)
    for row, rows in enumerate(([30, 31], [40, 41])):
        two.commit(row, [0, 1])
        alone = head.new_state(1, 64)
        feed(head, alone, histories[row])
        assert_near(found[row], feed(head, alone, rows))
    assert state.lengths.tolist() == [5, 7, 1]
    alone = head.new_state(1, 64)
    feed(head, alone, histories[2])
    assert_near(feed(head, state.row(2), [60]), feed(head, alone, [60]))

"""Which profile a pass takes, how its inputs lie in one buffer, and what a commit moves."""

import numpy as np
import pytest

from headstart.runtime import contract
from headstart.runtime.engines.buckets import ALIGNMENT, Packed, Pass, moves, passes, runs
from headstart.runtime.engines.info import Profile
from headstart.runtime.errors import EngineError

PROFILES = (
    Profile("prefill", {"rows": (1, 16, 32), "chosen": (1, 1, 1)}),
    Profile("verify-2", {"rows": (1, 1, 2), "chosen": (1, 1, 2)}),
    Profile("verify-4", {"rows": (4, 4, 4), "chosen": (4, 4, 4)}),
    Profile("verify-8", {"rows": (8, 8, 8), "chosen": (8, 8, 8)}),
)


@pytest.mark.parametrize(
    ("rows", "chosen", "expected"),
    [
        (1, 1, [Pass(1, 0, 1, 1)]),
        (2, 2, [Pass(1, 0, 2, 2)]),
        (3, 3, [Pass(2, 0, 3, 4)]),
        (5, 5, [Pass(3, 0, 5, 8)]),
        (12, 12, [Pass(3, 0, 8, 8), Pass(2, 8, 12, 4)]),
        (3, 1, [Pass(0, 0, 3, 3, True)]),
        (70, 1, [Pass(0, 0, 32, 32, True), Pass(0, 32, 64, 32, True), Pass(0, 64, 70, 6, True)]),
    ],
)
def test_passes(rows: int, chosen: int, expected: list[Pass]) -> None:
    assert list(passes(PROFILES, rows, chosen)) == expected


def test_no_profile() -> None:
    with pytest.raises(EngineError, match="no profile for prompts"):
        list(passes(PROFILES[1:], 1, 1))


def test_several_sequences_are_never_a_prompt() -> None:
    assert list(passes(PROFILES, 3, 1, batch=2)) == [Pass(2, 0, 3, 4)]


def test_one_buffer_holds_all_inputs_aligned_and_apart() -> None:
    packed = Packed(2, 3, 3)
    assert all(offset % ALIGNMENT == 0 for offset in packed.offsets.values())
    assert len(set(packed.offsets.values())) == len(packed.shapes) == 5
    assert packed.shapes[contract.ROW_MASK] == (2, 3, 3) and packed.shapes[contract.WRITE_INDEX] == (2,)


def test_padding_sees_itself_and_is_seen_by_nobody() -> None:
    packed = Packed(2, 4, 4)
    ids, mask = np.array([[7, 8, 9], [1, 2, 3]]), np.tri(3, dtype=np.bool_)[None].repeat(2, 0)
    packed.fill(np.array([5, 9]), Pass(2, 0, 3, 4), ids, 5 + np.arange(3)[None].repeat(2, 0), mask, np.arange(3)[None])
    views = packed.views
    assert views[contract.INPUT_IDS].tolist() == [[7, 8, 9, 9], [1, 2, 3, 3]] and views[contract.WRITE_INDEX].tolist() == [5, 9]
    assert views[contract.ROW_MASK].astype(int).tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]] * 2


def test_later_passes_write_behind_earlier_ones() -> None:
    packed = Packed(1, 2, 1)
    ids, mask = np.arange(4)[None], np.tri(4, dtype=np.bool_)[None]
    packed.fill(np.array([1]), Pass(0, 2, 4, 2, True), ids, ids, mask, np.array([[3]]))
    views = packed.views
    assert views[contract.WRITE_INDEX].tolist() == [3] and views[contract.OUTPUT_ROWS].tolist() == [[1]]
    assert views[contract.ROW_MASK].astype(int).tolist() == [[[1, 0], [1, 1]]]
    mask[0, 3, 0] = False
    with pytest.raises(AssertionError, match="has to fit one pass"):
        packed.fill(np.array([1]), Pass(0, 2, 4, 2, True), ids, ids, mask, np.array([[3]]))


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        ([], []),
        ([(14, 11), (15, 12), (16, 13), (17, 14)], [(14, 11, 3), (17, 14, 1)]),  # the fourth would be written while it is read
        ([(12, 11), (15, 12)], [(12, 11, 1), (15, 12, 1)]),
    ],
)
def test_neighbours_move_together(moved: list[tuple[int, int]], expected: list[tuple[int, int, int]]) -> None:
    assert runs(moved) == expected


@pytest.mark.parametrize(("kept", "expected"), [([0, 1, 2], []), ([0, 2, 5], [(12, 11), (15, 12)]), ([0], [])])
def test_a_commit_moves_only_what_is_not_in_place(kept: list[int], expected: list[tuple[int, int]]) -> None:
    assert moves(10, kept) == expected

"""Which profile a pass takes, how its inputs lie in one buffer, and what a commit moves."""

import numpy as np
import pytest

from headstart.runtime import contract
from headstart.runtime.engines.buckets import ALIGNMENT, Packed, Pass, moves, passes
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


def test_one_buffer_holds_all_inputs_aligned_and_apart() -> None:
    packed = Packed(3, 3, 40)
    assert all(offset % ALIGNMENT == 0 for offset in packed.offsets.values())
    assert len(set(packed.offsets.values())) == len(contract.STEP_INPUTS) == len(packed.shapes)


def test_padding_is_seen_by_nobody() -> None:
    packed = Packed(4, 4, 16)
    ids, mask = np.array([[7, 8, 9]]), np.tri(3, dtype=np.bool_)[None]
    packed.fill(5, Pass(2, 0, 3, 4), ids, 5 + np.arange(3)[None], mask, np.arange(3)[None])
    views = packed._views
    assert views[contract.INPUT_IDS].tolist() == [[7, 8, 9, 9]] and views[contract.WRITE_INDEX].tolist() == [5]
    seen = views[contract.ATTENTION_MASK][0, 0]
    assert not seen[:3, 8:].any() and seen[:3, :5].all() and seen[:3, 5:8].tolist() == np.tri(3, dtype=bool).tolist()
    assert seen[3].sum() == 6  # the history and one row: enough not to be 0/0


def test_later_passes_see_earlier_ones() -> None:
    packed = Packed(2, 1, 16)
    ids = np.arange(4)[None]
    packed.fill(1, Pass(0, 2, 4, 2, True), ids, ids, np.tri(4, dtype=np.bool_)[None], np.array([[3]]))
    views = packed._views
    assert views[contract.WRITE_INDEX].tolist() == [3] and views[contract.OUTPUT_ROWS].tolist() == [[1]]
    assert views[contract.ATTENTION_MASK][0, 0, :, :6].astype(int).tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize(("kept", "expected"), [([0, 1, 2], []), ([0, 2, 5], [(12, 11), (15, 12)]), ([0], [])])
def test_a_commit_moves_only_what_is_not_in_place(kept: list[int], expected: list[tuple[int, int]]) -> None:
    assert moves(10, kept) == expected

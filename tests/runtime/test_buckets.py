"""Which profile a pass takes, and which slots move together."""

import pytest

from headstart.runtime.engines.buckets import Pass, passes, runs
from headstart.runtime.engines.info import Profile
from headstart.runtime.errors import EngineError
from headstart.runtime.states import moves

PROFILES = (
    Profile("prefill", {"rows": (1, 16, 32), "chosen": (1, 1, 1)}),
    Profile("verify-2", {"rows": (1, 1, 2), "chosen": (1, 1, 2)}),
    Profile("verify-4", {"rows": (4, 4, 4), "chosen": (4, 4, 4)}),
    Profile("verify-8", {"rows": (8, 8, 8), "chosen": (8, 8, 8)}),
)


def prompt(begin: int, end: int) -> Pass:
    return Pass(0, begin, end, end - begin, prompt=True, chosen=1, replayed=False)


@pytest.mark.parametrize(
    ("rows", "chosen", "expected"),
    [
        (1, 1, [Pass(1, 0, 1, 1, chosen=1)]),
        (2, 2, [Pass(1, 0, 2, 2, chosen=2)]),
        (3, 3, [Pass(2, 0, 3, 4, chosen=4)]),
        (5, 5, [Pass(3, 0, 5, 8, chosen=8)]),
        (12, 12, [Pass(3, 0, 8, 8, chosen=8), Pass(2, 8, 12, 4, chosen=4)]),
        (3, 1, [prompt(0, 3)]),
        (70, 1, [prompt(0, 32), prompt(32, 64), prompt(64, 70)]),
    ],
)
def test_passes(rows: int, chosen: int, expected: list[Pass]) -> None:
    assert passes(PROFILES, rows, chosen) == expected


def test_no_profile() -> None:
    with pytest.raises(EngineError, match="no profile for prompts"):
        passes(PROFILES[1:], 1, 1)


def test_several_sequences_are_never_a_prompt() -> None:
    assert passes(PROFILES, 3, 1, batch=2) == [Pass(2, 0, 3, 4, chosen=4)]


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

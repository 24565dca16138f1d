"""Outputs against targets: facts, and what cannot be measured."""

import pytest

from headstart.calibration.answers import edits, exact_share, word_error_rate
from headstart.runtime.errors import OptionError


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [("a b c", "a b c", 0), ("a c", "a b c", 1), ("a x c d", "a b c", 2), ("", "a b", 2), ("b a", "a b", 2)],
)
def test_edits_are_the_fewest(text: str, target: str, expected: int) -> None:
    assert edits(text.split(), target.split()) == expected == edits(target.split(), text.split())


def test_word_errors_are_counted_over_all_words() -> None:
    assert word_error_rate(["a b", "x"], ["a b c", "y"]) == 0.5, "not the mean of 1/3 and 1"
    with pytest.raises(OptionError, match=r"hold no word.*Fix: "):
        word_error_rate(["a"], [""])


def test_exact_is_to_the_letter_but_for_space_around() -> None:
    assert exact_share([" a b\n", "a  b", "A b"], ["a b"] * 3) == 1 / 3

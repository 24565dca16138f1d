"""Outputs against targets: facts, and what cannot be measured."""

import sys

import pytest

from headstart.calibration.answers import exact_share, word_error_rate
from headstart.runtime.errors import MissingExtraError, OptionError


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [("a b c", "a b c", 0), ("a c", "a b c", 1), ("a x c d", "a b c", 2), ("", "a b", 2), ("b a", "a b", 2), ("A b", "a b", 1)],
)
def test_edits_are_the_fewest(text: str, target: str, expected: int) -> None:
    assert word_error_rate([text], [target]) == pytest.approx(expected / len(target.split()))


def test_word_errors_are_counted_over_all_words() -> None:
    assert word_error_rate(["a b", "x"], ["a b c", "y"]) == 0.5, "not the mean of 1/3 and 1"
    with pytest.raises(OptionError, match=r"hold no word.*Fix: "):
        word_error_rate(["a"], [""])
    assert word_error_rate(["x", "a"], ["", "a"]) == 1, "a word where there is none is an insertion"


def test_without_jiwer_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'headstart\[bench\]'"):
        word_error_rate(["a"], ["b"])


def test_exact_is_to_the_letter_but_for_space_around() -> None:
    assert exact_share([" a b\n", "a  b", "A b"], ["a b"] * 3) == 1 / 3

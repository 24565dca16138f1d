"""The speech sample's grammar: numbers in words, and a split that keeps sentences apart."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "samples" / "checkpoints"))

from commands import is_held_out, sentences, spell


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (75, "seventy five"),
        (300, "three hundred"),
        (4002, "four thousand two"),
        (120_019, "one hundred twenty thousand nineteen"),
    ],
)
def test_spell(number: int, words: str) -> None:
    assert spell(number) == words


def test_sides_of_the_split_share_no_sentence() -> None:
    training, held_out = sentences(2000, held_out=False, seed=0), sentences(200, held_out=True, seed=0)
    assert not set(training) & set(held_out)
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, training))


def test_sentences_are_plain_words_and_repeatable() -> None:
    found = sentences(500, held_out=False, seed=3)
    assert all(re.fullmatch(r"[a-z']+( [a-z']+)*", text) for text in found)
    assert found == sentences(500, held_out=False, seed=3)
    assert len(set(found)) == 500

"""The grammar behind the text-to-text sample: one right answer a sentence, and held-out answers that were never trained on."""

import importlib
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent.parent / "samples" / "checkpoints"
FORMS = {
    "date": r"\d{4}-\d\d-\d\d",
    "time": r"[012]\d:[0-5]\d",
    "amount": r"\d+\.\d\d (EUR|USD|GBP|CHF)",
    "count": r"\d+",
    "phone": r"\+\d{10,12}",
    "address": r"\d+[AB]? [A-Z]\w+( [A-Z]\w+){1,2}(, (Apartment|Suite|Floor) \d+)?",
    "duration": r"\d+(\.\d{1,2})? (h|min)",
    "speed": r"\d+(\.\d{1,2})? km/h",
}


@pytest.fixture(scope="module")
def grammar() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("messy_text")
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("kind", FORMS)
def test_what_is_messy_has_one_normal_form(grammar: ModuleType, kind: str) -> None:
    rng = random.Random(0)
    answers: dict[str, str] = {}
    for messy, normal in (grammar.MESSY[kind](rng) for _ in range(5000)):
        assert re.fullmatch(FORMS[kind], normal), (messy, normal)
        assert answers.setdefault(messy, normal) == normal
    assert len(answers) > len(set(answers.values())) or kind == "phone"  # some are written in several ways


def test_times_by_the_stated_rules(grammar: ModuleType) -> None:
    rng = random.Random(1)
    times = dict(grammar.time(rng) for _ in range(20000))
    assert (times["midnight"], times["noon"], times["12:30 am"]) == ("00:00", "12:00", "00:30")
    assert times["half past five pm"] == "17:30" and times["quarter to nine am"] == "08:45"


def test_the_day_comes_first_and_short_years_turn_at_fifty(grammar: ModuleType) -> None:
    rng = random.Random(1)
    written = [(re.fullmatch(r"(\d+)/(\d+)/(\d\d)", messy), normal) for messy, normal in map(grammar.date, [rng] * 5000)]
    found = {match: normal for match, normal in written if match}
    assert len(found) > 100
    for match, normal in found.items():
        day, month, year = map(int, match.groups())
        assert normal == f"{2000 + year if year < 50 else 1900 + year}-{month:02d}-{day:02d}"


def test_held_out_answers_are_never_trained_on(grammar: ModuleType) -> None:
    trained = {normal for _, normal in grammar.pairs(5, 2000, held_out=False)}
    held_out = {normal for _, normal in grammar.pairs(5, 100, held_out=True)}
    assert not trained & held_out
    assert grammar.pairs(5, 20, held_out=True) == grammar.pairs(5, 20, held_out=True)


def test_a_last_dot_ends_the_sentence_too(grammar: ModuleType) -> None:
    for messy, normal in grammar.pairs(7, 2000, held_out=False):
        assert messy.endswith(".") == normal.endswith("."), (messy, normal)

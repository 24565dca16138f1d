"""Whisper tiny.en and base: the words of synthetic recordings, in float32 and int8."""

from collections.abc import Callable
from pathlib import Path

import jiwer
import pytest
from published_bundles import Bundles

from headstart.runtime.loading import load
from headstart.runtime.prompts import read_answers

pytestmark = pytest.mark.published
RECORDINGS = Path(__file__).parents[2] / "samples/checkpoints/speech/recordings/texts.jsonl"
NAMES = ("whisper-tiny.en", "whisper-base")


@pytest.fixture(scope="module")
def recordings() -> list[tuple[Path, str]]:
    found = [(Path(prompt), str(text)) for prompt, text in read_answers(RECORDINGS)]
    return found[:8]


def words(text: str) -> str:
    return " ".join("".join(c if c.isalnum() or c in " '" else " " for c in text.lower()).split())


@pytest.mark.parametrize("name", NAMES)
def test_int8_hears_what_float32_does(
    name: str, bundles_of: Callable[[str], Bundles], recordings: list[tuple[Path, str]]
) -> None:
    bundles = bundles_of(name)
    language = None if name.endswith(".en") else "en"
    heard = {
        weights: [load(folder).transcribe(file, language, drafter="none").text for file, _ in recordings]
        for weights, folder in (("float32", bundles.float32), ("int8", bundles.int8))
    }
    for weights in heard:
        print(name, weights, jiwer.wer([words(t) for _, t in recordings], [words(t) for t in heard[weights]]), heard[weights])

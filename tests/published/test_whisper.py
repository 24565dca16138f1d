"""Whisper tiny.en and base on synthetic voices, which are hard for them: int8 must hear what float32 does, right or wrong."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from published_bundles import Bundles

import headstart
from headstart.calibration.report import compare
from headstart.calibration.verify import verify
from headstart.runtime.audio import load_audio
from headstart.runtime.prompts import read_inputs

pytestmark = pytest.mark.published
RECORDINGS = Path(__file__).parents[2] / "samples/checkpoints/speech/recordings/texts.jsonl"


@pytest.fixture(scope="module", params=["whisper-tiny.en", "whisper-base"])
def whisper(request: pytest.FixtureRequest, bundles_of: Callable[[str], Bundles]) -> Bundles:
    return bundles_of(request.param)


def test_int8_keeps_the_quality(whisper: Bundles) -> None:
    float32, int8 = compare([whisper.float32, whisper.int8], RECORDINGS, max_tokens=400).schemes
    assert int8.kl < 0.006 and int8.agreement > 0.95  # not rotated: 0.008 and 0.010
    assert int8.perplexity < 1.03 * float32.perplexity
    assert int8.disk_mb < 0.33 * float32.disk_mb


def test_nothing_is_found_by_verify(whisper: Bundles) -> None:
    report = verify(whisper.int8, read_inputs(RECORDINGS)[:2], 24, samples=50)
    assert report.ok, report


@pytest.mark.parametrize("sentence", [4, 5])
def test_words_begin_after_the_silence(whisper: Bundles, sentence: int) -> None:
    """Of three seconds; and end with the recording's speech."""
    spoken = load_audio(RECORDINGS.parent / f"sentences-{sentence}.wav", 16_000).samples
    heard = headstart.load(whisper.int8).transcribe(
        np.concatenate([np.zeros(3 * 16_000, np.float32), spoken]), "en", words=True
    )
    words = [word for segment in heard.segments for word in segment.words]
    assert len(words) > 5 and words[0].start > 2.7 and words[0].end > 3.1
    assert len(spoken) / 16_000 + 3 - 0.8 < words[-1].end <= heard.duration_s
    assert all(first.end <= second.end and first.start <= second.start for first, second in itertools.pairwise(words))
    assert "".join(word.text for word in words).split() == heard.text.split()


def test_silence_has_no_text(whisper: Bundles) -> None:
    """The checkpoints invent some: "you", "Thank you."."""
    model = headstart.load(whisper.int8)
    silence = 1e-4 * np.random.default_rng(0).standard_normal(16_000 * 8).astype(np.float32)
    assert model.transcribe(silence, voice_activity=True).text == ""

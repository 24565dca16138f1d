"""Whisper tiny.en and base on synthetic voices, which are hard for them: int8 must hear what float32 does, right or wrong."""

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


def test_no_word_is_said_in_a_pause(whisper: Bundles) -> None:
    """Two recordings with three seconds of silence between them."""
    parts = [load_audio(RECORDINGS.parent / f"sentences-{i}.wav", 16_000).samples for i in (1, 2)]
    begin, end = len(parts[0]) / 16_000, len(parts[0]) / 16_000 + 3
    joined = np.concatenate([parts[0], np.zeros(3 * 16_000, np.float32), parts[1]])
    heard = headstart.load(whisper.int8).transcribe(joined, "en", words=True)
    words = [word for segment in heard.segments for word in segment.words]
    assert sum(word.end < begin + 0.5 for word in words) >= 2 <= sum(word.start > end - 0.5 for word in words)
    assert not [word for word in words if begin + 0.5 < (word.start + word.end) / 2 < end - 0.5]
    assert "".join(word.text for word in words).split() == heard.text.split()


def test_silence_has_no_text(whisper: Bundles) -> None:
    """The checkpoints invent some: "you", "Thank you."."""
    model = headstart.load(whisper.int8)
    silence = 1e-4 * np.random.default_rng(0).standard_normal(16_000 * 8).astype(np.float32)
    assert model.transcribe(silence, voice_activity=True).text == ""

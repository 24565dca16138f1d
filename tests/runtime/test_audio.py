"""Recordings: what is converted and said so, what is refused, and with which words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from headstart.runtime.audio import load_audio
from headstart.runtime.errors import AudioError


def tone(rate: int, seconds: float = 0.5) -> Any:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


def written(path: Path, samples: Any, rate: int, subtype: str = "PCM_16") -> Path:
    soundfile.write(path, samples, rate, subtype)
    return path


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_16_khz_mono_comes_as_it_is(tmp_path: Path, suffix: str) -> None:
    audio = load_audio(written(tmp_path / f"a.{suffix}", tone(16_000), 16_000))
    assert (audio.samples.dtype, audio.notes, audio.duration_s) == (np.float32, (), 0.5)
    assert np.abs(audio.samples - tone(16_000)).max() <= 1 / 32768


def test_other_rates_are_converted_with_a_note(tmp_path: Path) -> None:
    audio = load_audio(written(tmp_path / "a.wav", tone(44_100), 44_100))
    assert audio.notes == ("44100 Hz to 16000 Hz",)
    assert len(audio.samples) == 8000
    assert np.abs(audio.samples - tone(16_000))[200:-200].max() < 1e-3  # the same tone, but for the ends


def test_channels_are_averaged_with_a_note(tmp_path: Path) -> None:
    stereo = np.stack([tone(16_000), np.zeros(8000)], axis=1)
    audio = load_audio(written(tmp_path / "a.wav", stereo, 16_000))
    assert audio.notes == ("2 channels averaged to one",)
    assert np.abs(audio.samples - tone(16_000) / 2).max() <= 1 / 32768


def test_8_bit_is_taken_with_a_note(tmp_path: Path) -> None:
    audio = load_audio(written(tmp_path / "a.wav", tone(16_000), 16_000, "PCM_U8"))
    assert audio.notes == ("8-bit samples: expect noise",)
    assert np.abs(audio.samples - tone(16_000)).max() <= 1 / 128


@pytest.mark.parametrize(("dtype", "least"), [("int16", 1 / 32768), ("int32", 1e-7), ("uint8", 1 / 128)])
def test_integers_are_scaled_to_one(dtype: str, least: float) -> None:
    info = np.iinfo(dtype)
    array = np.array([info.min, (info.min + info.max + 1) // 2, info.max], dtype)
    assert np.abs(load_audio(array).samples - [-1, 0, 1]).max() <= least


def test_empty(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"a\.wav is empty"):
        load_audio(written(tmp_path / "a.wav", np.zeros(0), 16_000))
    with pytest.raises(AudioError, match="array is empty"):
        load_audio(np.zeros(0, np.float32))
    (tmp_path / "b.wav").touch()
    with pytest.raises(AudioError, match=r"b\.wav cannot be read as sound"):
        load_audio(tmp_path / "b.wav")


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    file = written(tmp_path / f"a.{suffix}", tone(16_000, 4), 16_000)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"truncated|cannot be read"):
        load_audio(file)


def test_a_wav_from_a_pipe_states_no_size(tmp_path: Path) -> None:
    file = written(tmp_path / "a.wav", tone(16_000), 16_000)
    content = bytearray(file.read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    file.write_bytes(content)
    assert len(load_audio(file).samples) == 8000


@pytest.mark.parametrize("rate", [1_092_676, 12])
def test_a_header_with_an_impossible_rate(tmp_path: Path, rate: int) -> None:
    file = written(tmp_path / "a.wav", tone(16_000), 16_000)
    content = bytearray(file.read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(AudioError, match=rf"a\.wav says that it has {rate} samples a second.* Fix: "):
        load_audio(file)


def test_no_sound_at_all(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("half past seven\n" * 100)
    with pytest.raises(AudioError, match=r"notes\.txt cannot be read as sound"):
        load_audio(tmp_path / "notes.txt")
    with pytest.raises(AudioError, match="is not a file"):
        load_audio(tmp_path / "missing.wav")


@pytest.mark.parametrize("array", [np.zeros((2, 3, 4)), np.array(["a"]), np.array([True])])
def test_an_array_that_is_no_recording(array: Any) -> None:
    with pytest.raises(AudioError, match="is not a recording"):
        load_audio(array)


def test_samples_must_be_finite() -> None:
    with pytest.raises(AudioError, match="not finite"):
        load_audio(np.array([0.0, np.nan]))

"""Recordings as arrays: one channel of float32 samples between -1 and 1, at the model's sampling rate.

Files are read by libsndfile (WAV, FLAC, OGG, MP3, AIFF …) and resampled by soxr. Knows nothing of models or features.
"""

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import AudioError, missing_extra

LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000  # Hz: below telephones, and the highest that converters offer
SAMPLING_RATE = 16_000  # Hz, of every published speech model so far
Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Audio:
    """A recording.

    Attributes:
        samples: [samples] float32.
        sampling_rate: Hz.
        notes: conversions that were applied, as text; empty if there were none.
    """

    samples: Samples
    sampling_rate: int = SAMPLING_RATE
    notes: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        return len(self.samples) / self.sampling_rate


def load_audio(source: str | Path | NDArray[Any], sampling_rate: int = SAMPLING_RATE) -> Audio:
    """Read a file, or take an array that already has `sampling_rate`.

    Args:
        source: a sound file; or [samples], or [samples, channels], floats in -1 … 1 or integers of their full range.
        sampling_rate: Hz, of the result.

    Raises:
        AudioError: no such file, not a sound file, empty, truncated, or samples that are not finite.
        MissingExtraError: a file was given and `headstart[audio]` is not installed.
    """
    if isinstance(source, np.ndarray):
        audio = Audio(_floats(source), sampling_rate)
    else:
        audio = _resampled(read_file(Path(source)), sampling_rate)
    if not len(audio.samples):
        raise AudioError(f"{_name(source)} is empty: a recording needs at least one sample.")
    if not np.isfinite(audio.samples).all():
        raise AudioError(f"{_name(source)} has samples that are not finite numbers. Fix: write it again.")
    return audio


def read_file(path: Path) -> Audio:
    """A sound file at its own rate, its channels averaged. Raises what `load_audio` does."""
    try:
        import soundfile
    except ModuleNotFoundError as error:
        raise missing_extra(error, f"Reading {path.name}") from error
    if not path.is_file():
        raise AudioError(f"{path} is not a file. A recording is a sound file such as WAV or FLAC.")
    _refuse_truncated_wav(path)
    try:
        with soundfile.SoundFile(path) as file:
            samples, promised, subtype, rate = (
                file.read(dtype="float32", always_2d=True),
                file.frames,
                file.subtype,
                file.samplerate,
            )
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path} cannot be read as sound ({error.error_string}). Fix: a WAV or FLAC file.") from error
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise AudioError(
            f"{path} says that it has {rate} samples a second, and sound has {LOWEST_RATE} to {HIGHEST_RATE}: its header is "
            "damaged. Fix: record or convert it again."
        )
    if len(samples) < promised:
        raise _truncated(path, promised, len(samples), "frames")
    notes = ["8-bit samples: expect noise"] if subtype in ("PCM_U8", "PCM_S8", "ULAW", "ALAW") else []
    if samples.shape[1] > 1:
        notes.append(f"{samples.shape[1]} channels averaged to one")
    return Audio(samples.mean(axis=1, dtype=np.float32), rate, tuple(notes))


def _refuse_truncated_wav(path: Path) -> None:
    """libsndfile reads a truncated WAV without an error. Writers to a pipe leave its size at 0 or at the maximum."""
    with path.open("rb") as file:
        header = file.read(12)
    if len(header) < 12 or header[:4] != b"RIFF" or header[8:] != b"WAVE":
        return
    (promised,) = struct.unpack("<I", header[4:8])
    present = path.stat().st_size - 8
    if present < promised < 0xFFFFFFFF - 8:
        raise _truncated(path, promised, present, "bytes")


def _truncated(path: Path, promised: int, present: int, unit: str) -> AudioError:
    return AudioError(f"{path} is truncated: its header promises {promised} {unit}, it has {present}. Fix: copy it again.")


def _resampled(audio: Audio, rate: int) -> Audio:
    if audio.sampling_rate == rate:
        return audio
    try:
        import soxr
    except ModuleNotFoundError as error:
        raise missing_extra(error, f"Converting {audio.sampling_rate} Hz to {rate} Hz") from error
    samples = np.ascontiguousarray(soxr.resample(audio.samples, audio.sampling_rate, rate), np.float32)
    return replace(audio, samples=samples, sampling_rate=rate, notes=(*audio.notes, f"{audio.sampling_rate} Hz to {rate} Hz"))


def _floats(array: NDArray[Any]) -> Samples:
    """[samples] or [samples, channels] of floats or integers as [samples] float32."""
    if array.ndim not in (1, 2) or array.dtype.kind not in "fiu":
        raise AudioError(
            f"An array of shape {list(array.shape)} and type {array.dtype} is not a recording. "
            "Fix: [samples] or [samples, channels] of floats between -1 and 1, or of integers."
        )
    samples = array.astype(np.float32)
    if array.dtype.kind in "iu":
        info = np.iinfo(array.dtype)
        middle = (info.max + 1 + info.min) / 2  # 0 for signed integers, 128 for the unsigned bytes of 8-bit WAV
        samples = (samples - middle) / (info.max + 1 - middle)
    return np.ascontiguousarray(samples if samples.ndim == 1 else samples.mean(axis=1), np.float32)


def _name(source: Any) -> str:
    return "The array" if isinstance(source, np.ndarray) else str(source)

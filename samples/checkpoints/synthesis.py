"""Text to speech for the speech sample: espeak-ng, through the library that `pip install espeakng-loader` brings.

One process, no temporary files: some hundred times faster than real time on one core.
"""

import ctypes
from dataclasses import dataclass

import espeakng_loader
import numpy as np
import soxr

SAMPLING_RATE = 16_000  # Hz
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc")  # espeak-ng calls British English "en"
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m7", "f1", "f2", "f3", "f5")
HELD_OUT_VARIANT = "f4"  # never heard in training, with any accent

_SYNCHRONOUS, _CHARACTERS, _UTF8 = 2, 1, 1  # AUDIO_OUTPUT_SYNCHRONOUS, POS_CHARACTER, espeakCHARS_UTF8
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeakRATE, espeakPITCH, espeakRANGE
_LIST_TERMINATED, _WORD = 0, 1  # espeakEVENT_…


@dataclass(frozen=True)
class Voice:
    """How a sentence is said. Rate in words per minute, pitch and its range from 0 to 99."""

    accent: str
    variant: str
    rate: int
    pitch: int
    pitch_range: int


def random_voice(rng: np.random.Generator, variants: tuple[str, ...] = VARIANTS) -> Voice:
    return Voice(
        accent=str(rng.choice(ACCENTS)),
        variant=str(rng.choice(variants)),
        rate=int(rng.integers(130, 211)),
        pitch=int(rng.integers(25, 76)),
        pitch_range=int(rng.integers(30, 71)),
    )


@dataclass(frozen=True)
class Utterance:
    """What was said. `words` has (characters of the text spoken so far, seconds at which the next word begins)."""

    wave: np.ndarray  # [samples] float32 in -1 … 1 at SAMPLING_RATE
    words: list[tuple[int, float]]


class _Event(ctypes.Structure):  # espeak_EVENT in speak_lib.h
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_int64),
    )


class Synthesizer:
    """espeak-ng; one per process, since the library keeps global state."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        if self._rate <= 0:
            raise RuntimeError("espeak-ng found no voices in the wheel of espeakng-loader: reinstall it")
        self._pieces: list[bytes] = []
        self._words: list[tuple[int, float]] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self._callback = kind(self._keep)  # the library holds only the address: this reference keeps it alive
        self._library.espeak_SetSynthCallback(self._callback)

    def _keep(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: "ctypes._Pointer[_Event]") -> int:
        if samples and count:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        index = 0
        while events[index].type != _LIST_TERMINATED:
            if events[index].type == _WORD:
                self._words.append((events[index].text_position - 1, events[index].audio_position / 1000))
            index += 1
        return 0

    def speak(self, text: str, voice: Voice) -> Utterance:
        """The silence at both ends is cut off."""
        name = f"{voice.accent}+{voice.variant}"
        if self._library.espeak_SetVoiceByName(name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {name}")
        for parameter, value in ((_RATE, voice.rate), (_PITCH, voice.pitch), (_RANGE, voice.pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._pieces.clear()
        self._words.clear()
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, len(data), 0, _CHARACTERS, 0, _UTF8, None, None)
        wave = np.frombuffer(b"".join(self._pieces), np.int16).astype(np.float32) / 32768
        return trim(soxr.resample(wave, self._rate, SAMPLING_RATE), self._words)


def trim(wave: np.ndarray, words: list[tuple[int, float]], margin: int = SAMPLING_RATE // 50) -> Utterance:
    """Without the near-silence at both ends, but for `margin` samples."""
    loud = np.flatnonzero(np.abs(wave) > 0.003)
    start, stop = max(0, int(loud[0]) - margin), int(loud[-1]) + margin
    return Utterance(wave[start:stop], [(said, time - start / SAMPLING_RATE) for said, time in words])

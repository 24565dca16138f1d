"""How a recording is heard: language, task, times, and what to do where the text looks wrong."""

import zlib
from dataclasses import dataclass

from .results import Result


@dataclass(frozen=True)
class Fallback:
    """When a window is decoded again, at a higher temperature, and when it is silence (arXiv 2212.04356, section 4.5).

    Attributes:
        temperatures: in turn, until the text is good enough; else the most probable text that does not repeat itself counts.
        compression_ratio: a text that zlib shrinks by more repeats itself; None never.
        mean_log_prob: of the tokens; a text of less is doubtful; None never.
        no_speech: probability of the no-speech token from which a doubtful window is silence; None never.
    """

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio: float | None = 2.4
    mean_log_prob: float | None = -1.0
    no_speech: float | None = 0.6

    def repeats(self, result: Result) -> bool:
        return self.compression_ratio is not None and compression_ratio(result.text) > self.compression_ratio

    def improbable(self, result: Result) -> bool:
        return self.mean_log_prob is not None and mean_log_prob(result) < self.mean_log_prob


@dataclass(frozen=True)
class SpeechOptions:
    """See Model.transcribe."""

    language: str | None = None
    task: str = "transcribe"
    timestamps: bool | None = None
    initial_prompt: str = ""
    conditioned: bool = False
    fallback: Fallback | None = Fallback()
    voice_activity: bool = False
    words: bool = False


def compression_ratio(text: str) -> float:
    content = text.encode()
    return len(content) / len(zlib.compress(content))


def mean_log_prob(result: Result) -> float:
    """Per token, as Whisper counts them: the end token too, whether it came or not."""
    return sum(token.log_prob for token in result.log_probs) / (len(result.log_probs) + 1)

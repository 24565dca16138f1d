"""From the tokens of one window of audio to segments with times, and to where the next window begins.

Whisper writes a timestamp at both ends of a segment: `<|0.00|> Hello.<|1.20|><|1.50|> Who is`. Two in a row end one segment
and begin the next. Whatever follows the last pair is unfinished: the window cut it off, so the next window begins where
the last finished segment ended. Source: openai/whisper, transcribe.py. Knows nothing of engines or of audio.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .word_times import Word

STEP_S = 0.02  # between two timestamp tokens


@dataclass(frozen=True)
class Segment:
    """A stretch of speech. Times in seconds from the recording's beginning; `token_ids` without timestamps.

    `words` only where they were asked for.
    """

    start: float
    end: float
    text: str
    token_ids: tuple[int, ...] = ()
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Span:
    """A segment inside its window: times in steps of STEP_S from the window's beginning."""

    start: int
    end: int
    token_ids: tuple[int, ...]


def split_window(tokens: Sequence[int], first: int, length: int) -> tuple[list[Span], int]:
    """(the finished spans, steps until the next window begins).

    Args:
        tokens: the window's output, without prompt and end token.
        first: the id of <|0.00|>; all ids from there on are timestamps.
        length: steps of audio in the window.
    """
    times = [token >= first for token in tokens]
    pairs = [i + 1 for i in range(len(tokens) - 1) if times[i] and times[i + 1]]
    if not pairs:
        last = next((token - first for token in reversed(tokens) if token > first), length)
        return [_span(tokens, first, 0, last)], length
    # A lone timestamp at the end closes the last segment, and no speech follows it.
    finished = times[-2:] == [False, True]
    bounds = [0, *pairs, *([len(tokens)] if finished else [])]
    spans = [_timed(tokens[begin:end], first) for begin, end in itertools.pairwise(bounds)]
    return spans, length if finished else spans[-1].end or length


def _timed(tokens: Sequence[int], first: int) -> Span:
    return _span(tokens, first, tokens[0] - first, tokens[-1] - first)


def _span(tokens: Sequence[int], first: int, start: int, end: int) -> Span:
    return Span(start, end, tuple(token for token in tokens if token < first))

"""When each word was said, from the cross-attention heads that follow the source in time.

A row of the decoder that is about to write a token attends to the sound of that token. The rows' attention over the source's
frames, of the checkpoint's alignment heads, is smoothed and averaged; dynamic time warping then finds the path that visits
tokens and frames in order with the most attention (openai/whisper, timing.py). Knows nothing of engines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MEDIAN = 7  # frames of the median filter, of every published Whisper
USUAL_S = 0.7  # duration of a word at most, as openai/whisper limits the median
BEFORE, AFTER = "\"'“¿([{-", "\"'.。,，!！?？:：”)]}、"  # punctuation of the next word, of the last one
SPACELESS = frozenset({"zh", "ja", "th", "lo", "my", "yue"})  # languages that put no spaces between words
REPLACEMENT = "\ufffd"  # what decoding writes for part of a character

Weights = NDArray[np.float32]


@dataclass(frozen=True)
class Word:
    """A word with its punctuation and the space before it. Times in seconds from the recording's beginning."""

    start: float
    end: float
    text: str


def attended(queries: Weights, keys: Weights, frames: int) -> Weights:
    """[n, T, F] attention of n heads over the first F frames.

    Args:
        queries: [T, n, D], scaled.
        keys: [n, E, D] of the source.
        frames: of it that hold sound.
    """
    scores = queries.transpose(1, 0, 2) @ keys[:, :frames].transpose(0, 2, 1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: Weights = weights / weights.sum(axis=-1, keepdims=True)
    return shares


def token_starts(weights: Weights, count: int) -> NDArray[np.int64]:
    """[count] the frame at which each token begins, of attention [n, T, F] whose last `count` rows write those tokens."""
    deviation = weights.std(axis=1, keepdims=True)
    standard = (weights - weights.mean(axis=1, keepdims=True)) / np.maximum(deviation, 1e-10)
    tokens, frames = warped(-_median_filtered(standard).mean(axis=0)[-count:])
    starts: NDArray[np.int64] = frames[np.concatenate([[True], np.diff(tokens) > 0])]
    return starts


def _median_filtered(weights: Weights) -> Weights:
    """Along the frames, mirrored at both ends."""
    half = MEDIAN // 2
    if weights.shape[-1] <= half:
        return weights
    padded = np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(half, half)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, MEDIAN, axis=-1)
    filtered: Weights = np.sort(windows, axis=-1)[..., half]
    return filtered


def warped(cost: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows, columns) of the cheapest path through [T, F] from the first corner to the last; each step adds to one or both.

    Both are computed one diagonal at a time, all of whose cells depend on the two diagonals before alone.
    """
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0
    step = np.zeros((rows + 1, columns + 1), np.int8)  # 0: both, 1: the row, 2: the column
    for diagonal in range(2, rows + columns + 1):
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        before = np.stack([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]])
        best = np.where((before[0] < before[1]) & (before[0] < before[2]), 0, np.where(before[1] < before[2], 1, 2))
        total[i, j] = cost[i - 1, j - 1] + before[best, np.arange(len(i))]
        step[i, j] = best
    return _path(step)


def _path(step: NDArray[np.int8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Backwards from the last cell to the first."""
    i, j = step.shape[0] - 1, step.shape[1] - 1
    visited = []
    while i > 0 and j > 0:
        visited.append((i - 1, j - 1))
        i, j = i - (step[i, j] != 2), j - (step[i, j] != 1)
    path = np.array(visited[::-1], np.int64)
    return path[:, 0], path[:, 1]


def split_words(tokens: Sequence[int], decode: Callable[[Sequence[int]], str], language: str) -> list[list[int]]:
    """The tokens of each word: a new one begins with a space or is punctuation; without spaces, with every character."""
    words: list[list[int]] = []
    for part in _whole_characters(tokens, decode):
        text = decode(part)
        if not words or language in SPACELESS or text.startswith(" ") or _is_mark(text):
            words.append(part)
        else:
            words[-1] = words[-1] + part
    return words


def _is_mark(text: str) -> bool:
    return bool(text.strip()) and text.strip() in BEFORE + AFTER


def _whole_characters(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[list[int]]:
    """Tokens joined until they make whole characters."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        parts[-1].append(token)
        if REPLACEMENT not in decode(parts[-1]):
            parts.append([])
    return [part for part in parts if part]


def without_pauses(words: Sequence[Word]) -> list[Word]:
    """A pause is counted to the word after it: no word begins more than twice the usual duration before it ends."""
    durations = [word.end - word.start for word in words if word.end > word.start]
    longest = 2 * min(USUAL_S, float(np.median(durations))) if durations else 0.0
    return [Word(max(word.start, word.end - longest), word.end, word.text) for word in words]


def with_punctuation(words: Sequence[Word]) -> list[Word]:
    """Punctuation joined to the word that it belongs to, whose times stay."""
    joined: list[Word] = []
    for word in words:
        mark = word.text.strip()
        if joined and mark and mark in AFTER and not word.text.startswith(" "):
            joined[-1] = Word(joined[-1].start, joined[-1].end, joined[-1].text + word.text)
        elif joined and joined[-1].text.strip() in BEFORE and joined[-1].text.startswith(" "):
            joined[-1] = Word(word.start, word.end, joined[-1].text + word.text)
        else:
            joined.append(word)
    return joined

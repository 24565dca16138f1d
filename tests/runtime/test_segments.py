"""Whisper's timestamps to segments, against transformers' own reading of them."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration

from headstart.runtime.segments import STEP_S, Span, split_window

FIRST = 100  # <|0.00|>
LENGTH = 300  # steps: a window of 6 s


def time(seconds: float) -> int:
    return FIRST + round(seconds / STEP_S)


def test_a_pair_ends_a_segment_and_what_follows_is_unfinished() -> None:
    tokens = [time(0), 1, 2, time(1.2), time(1.5), 3, 4]
    assert split_window(tokens, FIRST, LENGTH) == ([Span(0, 60, (1, 2))], 60)


def test_a_lone_timestamp_at_the_end_finishes_the_window() -> None:
    tokens = [time(0.5), 1, time(1), time(1), 2, 3, time(2)]
    assert split_window(tokens, FIRST, LENGTH) == ([Span(25, 50, (1,)), Span(50, 100, (2, 3))], LENGTH)


def test_a_pair_at_the_end() -> None:
    tokens = [time(0), 1, time(3), time(3.2)]
    assert split_window(tokens, FIRST, LENGTH) == ([Span(0, 150, (1,))], 150)


@pytest.mark.parametrize(("tokens", "end"), [([time(0), 1, 2], LENGTH), ([time(0.2), 1, time(2)], 100), ([1, 2], LENGTH)])
def test_without_a_pair_the_window_is_one_segment(tokens: list[int], end: int) -> None:
    assert split_window(tokens, FIRST, LENGTH) == ([Span(0, end, tuple(t for t in tokens if t < FIRST))], LENGTH)


def test_the_next_window_always_begins_later() -> None:
    assert split_window([time(0), time(0), 1], FIRST, LENGTH)[1] == LENGTH


def random_output(generator: np.random.Generator) -> list[int]:
    """Text between rising timestamps, as Whisper's rules let it be written; the end may be missing."""
    tokens, at = [], 0
    for _ in range(generator.integers(1, 5)):
        start = at + int(generator.integers(0, 20))
        at = start + int(generator.integers(1, 50))
        text = generator.integers(1, FIRST, generator.integers(1, 5)).tolist()
        tokens += [FIRST + start, *text, FIRST + at]
    unfinished = [[], [FIRST + at], [FIRST + at, 5], [FIRST + at + 3, 5, 6]]
    return [*tokens, *unfinished[generator.integers(4)]]


@pytest.mark.parametrize("seed", range(50))
def test_spans_equal_those_of_transformers(seed: int) -> None:
    tokens = random_output(np.random.default_rng(seed))
    retrieve: Any = WhisperForConditionalGeneration._retrieve_segment
    wanted, frames = retrieve(
        seek_sequence=torch.tensor(tokens),
        seek_outputs=[{}],
        time_offset=torch.zeros(1, dtype=torch.float64),
        timestamp_begin=FIRST,
        seek_num_frames=torch.tensor([2 * LENGTH]),
        time_precision=STEP_S,
        time_precision_features=0.01,
        input_stride=2,
        prev_idx=0,
        idx=0,
        return_token_timestamps=False,
        decoder_input_ids=torch.zeros(1, 1),
    )
    spans, advance = split_window(tokens, FIRST, LENGTH)
    assert advance == (int(frames) // 2 or LENGTH)
    assert [s.start * STEP_S for s in spans] == pytest.approx([float(s["start"]) for s in wanted])
    assert [s.end * STEP_S for s in spans] == pytest.approx([float(s["end"]) for s in wanted])
    texts = [tuple(t for t in s["tokens"].tolist() if t < FIRST) for s in wanted]
    assert [s.token_ids for s in spans] == texts

"""Logit rules against transformers' own processors over random texts, and the order in which they meet."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as reference

from headstart.runtime.errors import OptionError
from headstart.runtime.rules import (
    ForbiddenSequences,
    ForcedTokens,
    LogitRule,
    MinLength,
    NoRepeatNGram,
    RepetitionPenalty,
    SourceNoRepeatNGram,
    SuppressedTokens,
    TokenRules,
    WhisperTimestamps,
    in_order,
)
from headstart.runtime.sampling import LogitRules, SamplingOptions

VOCABULARY = 12
SOURCE = [3, 4, 5, 3, 4, 6, 7]
# Text is 0 to 6, the end token 7, a special token 8, <|notimestamps|> 9; timestamps are 10 to 19.
END, NO_TIMESTAMPS, SPEECH_VOCABULARY = 7, 9, 20

Case = tuple[LogitRule, Callable[[], Any]]
CASES: dict[str, Case] = {
    "penalty": (RepetitionPenalty(1.3), lambda: reference.RepetitionPenaltyLogitsProcessor(1.3)),
    "no 1-gram": (NoRepeatNGram(1), lambda: reference.NoRepeatNGramLogitsProcessor(1)),
    "no 2-gram": (NoRepeatNGram(2), lambda: reference.NoRepeatNGramLogitsProcessor(2)),
    "no 4-gram": (NoRepeatNGram(4), lambda: reference.NoRepeatNGramLogitsProcessor(4)),
    "source 2-gram": (
        SourceNoRepeatNGram(2, tuple(SOURCE)),
        lambda: reference.EncoderNoRepeatNGramLogitsProcessor(2, torch.tensor([SOURCE])),
    ),
    "source 3-gram": (
        SourceNoRepeatNGram(3, tuple(SOURCE)),
        lambda: reference.EncoderNoRepeatNGramLogitsProcessor(3, torch.tensor([SOURCE])),
    ),
    "forbidden": (
        ForbiddenSequences(((3,), (1, 2), (4, 4, 5))),
        lambda: reference.NoBadWordsLogitsProcessor([[3], [1, 2], [4, 4, 5]]),
    ),
    "min length": (MinLength(4, (2, 7)), lambda: reference.MinLengthLogitsProcessor(4, [2, 7])),
    "min new tokens": (MinLength(2 + 3, (2,)), lambda: reference.MinNewTokensLengthLogitsProcessor(2, 3, [2])),
    "forced bos": (ForcedTokens(1, (5,)), lambda: reference.ForcedBOSTokenLogitsProcessor(5)),
    "forced eos": (ForcedTokens(6 - 1, (2, 7)), lambda: reference.ForcedEOSTokenLogitsProcessor(6, [2, 7])),
    "suppressed": (SuppressedTokens((1, 9)), lambda: reference.SuppressTokensLogitsProcessor([1, 9])),
    "suppressed at begin": (SuppressedTokens((1, 9), 3), lambda: reference.SuppressTokensAtBeginLogitsProcessor([1, 9], 3)),
}


def reference_logits(processor: Any, logits: np.ndarray[Any, Any], text: list[int]) -> Any:
    return processor(torch.tensor([text]), torch.from_numpy(logits.copy())[None])[0].numpy()


@pytest.mark.parametrize("case", CASES)
def test_rules_are_those_of_transformers(case: str) -> None:
    rule, make = CASES[case]
    generator = np.random.default_rng(0)
    changed = 0
    for length in [*range(1, 9), 30, 60] * 6:
        logits = (generator.standard_normal(VOCABULARY) * 3).astype(np.float32)
        text = generator.integers(0, 8, length).tolist()
        ours = logits.copy()
        rule.apply(ours, text)
        np.testing.assert_array_equal(ours, reference_logits(make(), logits, text))
        changed += not np.array_equal(ours, logits)
    assert changed > 0, "the rule had something to do"


def speech_text(generator: np.random.Generator, begin: int, length: int) -> list[int]:
    """A prompt and an output in which timestamps stand everywhere, in any order."""
    output = np.where(generator.random(length) < 0.5, generator.integers(0, 7, length), generator.integers(10, 20, length))
    return [*generator.integers(0, SPEECH_VOCABULARY, begin).tolist(), *output.tolist()]


@pytest.mark.parametrize("max_initial", [None, 3])
@pytest.mark.parametrize("begin", [1, 3])
def test_timestamps_are_those_of_transformers(begin: int, max_initial: int | None) -> None:
    config = GenerationConfig(eos_token_id=END)
    config.no_timestamps_token_id = NO_TIMESTAMPS
    config.max_initial_timestamp_index = max_initial
    theirs = reference.WhisperTimeStampLogitsProcessor(config, begin_index=begin)
    ours = WhisperTimestamps(NO_TIMESTAMPS, END, begin, max_initial)
    generator = np.random.default_rng(begin)
    texts_kept = set()
    for length in [0, 0, 1, 2, 3, 4, 5, 6, 9] * 40:
        logits = (generator.standard_normal(SPEECH_VOCABULARY) * 3).astype(np.float32)
        text = speech_text(generator, begin, length)
        found = logits.copy()
        ours.apply(found, text)
        np.testing.assert_array_equal(found, reference_logits(theirs, logits, text))
        texts_kept.add(bool(np.isfinite(found[:NO_TIMESTAMPS]).any()))
    assert texts_kept == {True, False}, "both outcomes of the sum rule were seen"


def test_begin_and_length_come_from_the_text() -> None:
    """As transformers' generate sets its processors up: behind a forced token the begin is one later."""
    rules = TokenRules(
        forced_bos_token_id=5, forced_eos_token_ids=(2,), begin_suppress_tokens=(3,), min_length=4, min_new_tokens=1
    )
    assert rules.for_text(1, 20, frozenset({2})) == (
        MinLength(4, (2,)),
        ForcedTokens(1, (5,)),
        ForcedTokens(19, (2,)),
        SuppressedTokens((3,), 2),
    )
    assert rules.for_text(6, 20, frozenset({2}))[0] == MinLength(7, (2,))
    assert rules.for_text(6, 20, frozenset())[-1] == SuppressedTokens((3,), 6)
    assert TokenRules().for_text(6, 20, frozenset({2})) == ()


def test_the_later_rule_has_the_last_word() -> None:
    forced, least, never = ForcedTokens(2, (7,)), MinLength(10, (7,)), SuppressedTokens((7,))
    assert in_order([never, forced, least]) == (least, forced, never)
    logits = np.zeros(VOCABULARY, np.float32)
    assert LogitRules(SamplingOptions(), [forced, least]).process(logits, [0, 0]).argmax() == 7


def test_rules_that_leave_nothing_are_named() -> None:
    rules = LogitRules(SamplingOptions(suppress_tokens=(7,)), [ForcedTokens(2, (7,))])
    with pytest.raises(OptionError, match=r"after 2 tokens .* forbid every token: .*ForcedTokens"):
        rules.process(np.zeros(VOCABULARY, np.float32), [0, 0])


def test_no_rule_costs_nothing() -> None:
    logits = np.zeros(VOCABULARY, np.float32)
    assert LogitRules(SamplingOptions()).process(logits, [0]) is logits

"""Logit rules against transformers' own processors over random texts; their states, and the order of the rules."""

import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
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
    RuleState,
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
    "min length, an id beyond": (MinLength(4, (2, 999)), lambda: reference.MinLengthLogitsProcessor(4, [2, 999])),
    "suppressed, an id beyond": (SuppressedTokens((1, 999)), lambda: reference.SuppressTokensLogitsProcessor([1, 999])),
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
        rule.start(text).mask(ours)
        np.testing.assert_array_equal(ours, reference_logits(make(), logits, text))
        changed += not np.array_equal(ours, logits)
    assert changed > 0, "the rule had something to do"


def speech_text(generator: np.random.Generator, begin: int, length: int) -> list[int]:
    """A prompt and an output with timestamps anywhere, in any order."""
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
        ours.start(text).mask(found)
        np.testing.assert_array_equal(found, reference_logits(theirs, logits, text))
        texts_kept.add(bool(np.isfinite(found[:NO_TIMESTAMPS]).any()))
    assert texts_kept == {True, False}, "both outcomes of the sum rule were seen"


# A vocabulary of realistic size: ordinary tokens, an end token, <|notimestamps|>, and 1,501 timestamps.
LARGE, LARGE_END, LARGE_NO_TIMESTAMPS = 5000, 3400, 3498
WORDS = [7, 40, 1999, 2000, 3399]  # few, so that n-grams repeat; text of these and of timestamps
TIMES = [3499, 3600, 4999]
LARGE_RULES: dict[str, LogitRule] = {
    "penalty": RepetitionPenalty(1.3),
    "no 1-gram": NoRepeatNGram(1),
    "no 2-gram": NoRepeatNGram(2),
    "no 4-gram": NoRepeatNGram(4),
    "no 50-gram": NoRepeatNGram(50),
    "source 1-gram": SourceNoRepeatNGram(1, (7, 40)),
    "source 3-gram": SourceNoRepeatNGram(3, (7, 40, 7, 7, 1999, 40, 7, 2000)),
    "forbidden": ForbiddenSequences(((3,), (7, 40), (7, 41), (2000, 7, 40), (40, 40, 7, 4999))),
    "no sequence forbidden": ForbiddenSequences(()),
    "min length": MinLength(30, (LARGE_END, 17)),
    "forced": ForcedTokens(35, (5, 4000)),
    "suppressed": SuppressedTokens(tuple(range(0, LARGE, 37))),
    "suppressed at begin": SuppressedTokens((1, 9), 35),
    "timestamps": WhisperTimestamps(LARGE_NO_TIMESTAMPS, LARGE_END, 20, 50),
}
EXACT = sorted(set(LARGE_RULES) - {"timestamps"})  # what these forbid never depends on the logits


def large_text(generator: np.random.Generator, length: int) -> list[int]:
    tokens: list[int] = generator.choice([*WORDS, *WORDS, *TIMES], length).tolist()
    return tokens


def masked(state: RuleState, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    changed = logits.copy()
    state.mask(changed)
    return changed


@pytest.mark.parametrize("name", LARGE_RULES)
def test_a_state_that_advances_and_forks_is_one_started_afresh(name: str) -> None:
    """Along a text of 200 tokens; at every token a fork goes another way, and is looked at again once the text went on."""
    rule, generator = LARGE_RULES[name], np.random.default_rng(0)
    logits = generator.standard_normal(LARGE).astype(np.float32)
    text = large_text(generator, 18)
    state = rule.start(text)
    forks: list[tuple[RuleState, list[int]]] = []
    for token in large_text(generator, 200):
        fork, branch = state.fork(), large_text(generator, int(generator.integers(1, 5)))
        for other in branch:
            fork.advance(other)
        forks.append((fork, [*text, *branch]))
        state.advance(token)
        text = [*text, token]
        np.testing.assert_array_equal(masked(state, logits), masked(rule.start(text), logits))
    for fork, branch in forks:
        np.testing.assert_array_equal(masked(fork, logits), masked(rule.start(branch), logits))


@pytest.mark.parametrize("name", LARGE_RULES)
def test_what_a_rule_forbids_is_masked_whatever_the_logits(name: str) -> None:
    rule, generator = LARGE_RULES[name], np.random.default_rng(1)
    for length in [1, 2, 19, 20, 21, 22, 23, 35, 90]:
        state = rule.start(large_text(generator, length))
        forbidden = np.array([state.forbids(token) for token in range(LARGE)])
        for _ in range(3):
            # Text far above timestamps, or far below: both outcomes of the rule that compares their sums.
            logits = generator.standard_normal(LARGE).astype(np.float32)
            logits[: LARGE_NO_TIMESTAMPS + 1] += generator.choice([-30, 30])
            excluded = masked(state, logits) == -np.inf
            assert not (forbidden & ~excluded).any()
            assert name not in EXACT or (forbidden == excluded).all()


@pytest.mark.parametrize("length", [19, 20, 25, 35, 60])
def test_all_rules_together_forbid_only_what_they_mask(length: int) -> None:
    """A forced token overrules what earlier rules forbade, and is overruled by later ones."""
    generator = np.random.default_rng(length)
    rules = [LARGE_RULES[name] for name in LARGE_RULES if name not in ("no 1-gram", "source 1-gram")]
    text = large_text(generator, length)
    state = LogitRules(SamplingOptions(), [*rules, ForcedTokens(19, (LARGE_END, 3)), ForcedTokens(20, (3500,))]).start(text)
    forbidden = np.array([state.forbids(token) for token in range(LARGE)])
    excluded = state.process(generator.standard_normal(LARGE).astype(np.float32)) == -np.inf
    assert forbidden.any() and not (forbidden & ~excluded).any()
    if length == 19:
        assert np.flatnonzero(~forbidden).tolist() == [3, LARGE_END], "both are forbidden by rules before the forced tokens"


def allocated(make: Callable[[], Sequence[object]]) -> int:
    tracemalloc.start()
    kept = make()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept
    return size


@pytest.mark.parametrize("name", LARGE_RULES)
def test_forks_share_a_long_text(name: str) -> None:
    """The 63 nodes of the largest tree over 4,000 tokens: a copy of the text for each would be 2 MB."""
    state = LARGE_RULES[name].start(large_text(np.random.default_rng(2), 4000))
    state.forbids(7)
    assert allocated(lambda: [state.fork() for _ in range(63)]) < 100_000


def test_begin_and_length_come_from_the_text() -> None:
    """As transformers' generate sets up its processors: after a forced token the begin is one later."""
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
    assert LogitRules(SamplingOptions(), [forced, least]).start([0, 0]).process(logits).argmax() == 7


def test_rules_that_leave_nothing_are_named() -> None:
    rules = LogitRules(SamplingOptions(suppress_tokens=(7,)), [ForcedTokens(2, (7,))])
    with pytest.raises(OptionError, match=r"after 2 tokens .* forbid every token: .*ForcedTokens"):
        rules.start([0, 0]).process(np.zeros(VOCABULARY, np.float32))


def test_no_rule_costs_nothing() -> None:
    logits = np.zeros(VOCABULARY, np.float32)
    assert LogitRules(SamplingOptions()).start([0]).process(logits) is logits

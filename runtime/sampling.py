"""From logits to the distribution the next token is drawn from.

Logit rules (`rules`) change logits by the text so far: suppressed and forced tokens, no-repeat n-gram; the
warpers (temperature, top-k, top-p, min-p) then shape the distribution. Order and meaning are those of transformers'
processors. A verify pass applies all of them to every row it tests, so speculative decoding follows the warped target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import EngineError, OptionError
from .rules import LogitRule, NoRepeatNGram, RepetitionPenalty, RuleState, SuppressedTokens, in_order, replaces

BLOCK = 64  # scores of which only the best is looked at first


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k most probable tokens; 0 is off.
        top_p: keep the smallest set of tokens that holds this probability; 1 is off.
        min_p: drop tokens less probable than this share of the best one's probability; 0 is off.
        repetition_penalty: logits of tokens already in the text are divided (or multiplied, when negative) by it; 1 is off.
        no_repeat_ngram: no n-gram of this size occurs twice; 0 is off.
        suppress_tokens: never chosen.
        seed: makes sampling repeatable.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    suppress_tokens: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, f"temperature must be 0 (greedy) or more, got {self.temperature}.")
        _require(self.top_k >= 0, f"top_k must be 0 (off) or more, got {self.top_k}.")
        _require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}.")
        _require(0 <= self.min_p < 1, f"min_p must lie in [0, 1), got {self.min_p}.")
        _require(self.repetition_penalty > 0, f"repetition_penalty must be more than 0, got {self.repetition_penalty}.")
        _require(self.no_repeat_ngram >= 0, f"no_repeat_ngram must be 0 (off) or more, got {self.no_repeat_ngram}.")
        _require(self.seed is None or self.seed >= 0, f"seed must be 0 or more, got {self.seed}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def rules(self) -> list[LogitRule]:
        """The logit rules among the options."""
        rules: list[LogitRule] = []
        if self.repetition_penalty != 1:
            rules.append(RepetitionPenalty(self.repetition_penalty))
        if self.no_repeat_ngram:
            rules.append(NoRepeatNGram(self.no_repeat_ngram))
        if self.suppress_tokens:
            rules.append(SuppressedTokens(self.suppress_tokens))
        return rules


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise OptionError(message)


@dataclass(frozen=True)
class LogitRules:
    """The user's options, and the rules of the model and of the text: what is started for each text."""

    options: SamplingOptions
    text_rules: Sequence[LogitRule] = ()

    def start(self, prompt: Sequence[int]) -> "LogitState":
        """The state after the prompt."""
        rules = in_order([*self.options.rules(), *self.text_rules])
        return LogitState(self.options, rules, [rule.start(prompt) for rule in rules], len(prompt))


class LogitState:
    """All rules and options at one point of one text: from the logits there to the next token's distribution."""

    def __init__(self, options: SamplingOptions, rules: tuple[LogitRule, ...], states: list[RuleState], tokens: int) -> None:
        self.options = options
        self._rules, self._states, self._tokens = rules, states, tokens

    def __bool__(self) -> bool:
        """Whether any rule is on: else logits stay as they are."""
        return bool(self._states)

    def advance(self, token: int) -> None:
        """The text goes on with this token."""
        self._tokens += 1
        for state in self._states:
            state.advance(token)

    def fork(self) -> "LogitState":
        """A state of its own at the same point of the text."""
        return LogitState(self.options, self._rules, [state.fork() for state in self._states], self._tokens)

    def without(self, kind: type) -> "LogitState":
        """A state of its own at the same point of the text, without the rules of that class."""
        kept = [
            (rule, state.fork()) for rule, state in zip(self._rules, self._states, strict=True) if not isinstance(rule, kind)
        ]
        return LogitState(self.options, tuple(rule for rule, _ in kept), [state for _, state in kept], self._tokens)

    def forbids(self, token: int) -> bool:
        """True only where `process` sets this token to -inf whatever the logits are."""
        for state in reversed(self._states):
            if state.forbids(token):
                return True
            if replaces(state):
                return False
        return False

    def process(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """[V] float32 logits after the rules; the very input when no rule is on, never a changed input.

        Raises OptionError when the rules together leave no token.
        """
        if not self._states:
            return logits
        logits = logits.copy()
        for state in self._states:
            state.mask(logits)
        if logits.max() == -np.inf:
            names = ", ".join(type(rule).__name__ for rule in self._rules)
            raise OptionError(
                f"after {self._tokens} tokens the generation rules forbid every token: {names}. "
                "At least one must remain. Fix: leave out one of these rules."
            )
        return logits

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """[V] float64, the distribution the next token is drawn from; a one-hot of the best token when greedy.

        Raises EngineError for NaN, and as `process`.
        """
        scores = self.process(logits).astype(np.float64)
        if np.isnan(scores.max()):
            raise EngineError(f"After {self._tokens} tokens the model's logits hold NaN. Fix: headstart verify.")
        options = self.options
        if options.greedy:
            result = np.zeros_like(scores)
            result[scores.argmax()] = 1.0
            return result
        scores = scores / options.temperature
        if 0 < options.top_k < len(scores):
            scores[scores < kth_best(scores, options.top_k)] = -np.inf
        if options.top_p < 1:
            scores[_outside_top_p(scores, options.top_p)] = -np.inf
        probabilities = _softmax(scores)
        if options.min_p > 0:
            probabilities[probabilities < options.min_p * probabilities.max()] = 0.0
            probabilities /= probabilities.sum()
        return probabilities


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum())


def kth_best(scores: NDArray[Any], k: int) -> float:
    """The k-th highest score. At least k scores reach the k-th highest of the best ones of blocks: few are left to order."""
    blocks = scores[: len(scores) // BLOCK * BLOCK].reshape(-1, BLOCK).max(axis=1)
    few = scores if len(blocks) < k else scores[~(scores < np.partition(blocks, -k)[-k])]  # NaN stays, and is returned
    return float(np.partition(few, -k)[-k])


def _outside_top_p(scores: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
    """[V], true outside the smallest set of best tokens whose probability reaches top_p; the best token always stays.

    Tokens of (1 - top_p) / V or less are outside: even all of them together hold no more than 1 - top_p. Few are left to sort.
    """
    probabilities = _softmax(scores)
    candidates = np.flatnonzero(probabilities > (1 - top_p) / len(scores))
    rising = candidates[np.argsort(scores[candidates], kind="stable")]  # as transformers sorts
    below = probabilities.sum() - probabilities[candidates].sum()
    inside = below + np.cumsum(probabilities[rising]) > 1 - top_p
    inside[-1] = True
    outside = np.ones(len(scores), np.bool_)
    outside[rising[inside]] = False
    return outside

"""Logit rules: which tokens may follow, given the tokens before them.

A rule is started once for a text and then follows it: its state advances by a token, forks along the paths of a draft
tree, and changes the logits of the next token. Every row of a verify pass that is tested is masked by the states on its
own path, so a drafted token that a rule forbids has probability 0. Names, meaning and order are those of transformers'
logits processors.

`TokenRules` is what a model and a caller demand of every text; `for_text` turns it into rules once the text's lengths are
known.
"""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .bundle import GenerationRules
from .errors import OptionError
from .token_history import Followers, NGramHistory, SeenTokens, last_tokens, ngram_followers

Logits = NDArray[np.float32]  # [V]


class RuleState(Protocol):
    """One rule at one point of one text."""

    def advance(self, token: int) -> None:
        """The text goes on with this token."""
        ...

    def fork(self) -> "RuleState":
        """A state of its own at the same point: advancing either leaves the other as it is. Must be cheap."""
        ...

    def mask(self, logits: Logits) -> None:
        """Change the next token's [V] float32 logits in place."""
        ...

    def forbids(self, token: int) -> bool:
        """True only where `mask` sets this token to -inf whatever the logits are: such a draft need not be verified."""
        ...


class LogitRule(Protocol):
    """One rule. It does not change: its states do."""

    def start(self, prompt: Sequence[int]) -> RuleState:
        """The state after the prompt."""
        ...


@dataclass(frozen=True)
class RepetitionPenalty:
    """Logits of tokens in the text are divided (or multiplied, when negative) by the penalty."""

    penalty: float

    def start(self, prompt: Sequence[int]) -> "PenaltyState":
        return PenaltyState(self.penalty, SeenTokens(prompt))


@dataclass
class PenaltyState:
    penalty: float
    seen: SeenTokens

    def advance(self, token: int) -> None:
        self.seen.advance(token)

    def fork(self) -> "PenaltyState":
        return PenaltyState(self.penalty, self.seen.fork())

    def mask(self, logits: Logits) -> None:
        seen = self.seen.array()
        scores = logits[seen]
        logits[seen] = np.where(scores < 0, scores * self.penalty, scores / self.penalty)

    def forbids(self, token: int) -> bool:
        return False


@dataclass(frozen=True)
class NoRepeatNGram:
    """No n-gram of this size occurs twice in the text."""

    size: int

    def start(self, prompt: Sequence[int]) -> "NGramState":
        return NGramState(NGramHistory(self.size, prompt))


@dataclass
class NGramState:
    history: NGramHistory

    def advance(self, token: int) -> None:
        self.history.advance(token)

    def fork(self) -> "NGramState":
        return NGramState(self.history.fork())

    def mask(self, logits: Logits) -> None:
        _forbid(logits, self.history.repeats())

    def forbids(self, token: int) -> bool:
        return token in self.history.repeats()


@dataclass(frozen=True)
class SourceNoRepeatNGram:
    """No n-gram of this size is copied from the source, the encoder's input."""

    size: int
    source_ids: tuple[int, ...]

    def start(self, prompt: Sequence[int]) -> "CompletionState":
        return CompletionState({self.size - 1: ngram_followers(self.source_ids, self.size)}, prompt)


@dataclass(frozen=True)
class ForbiddenSequences:
    """None of these token sequences is completed ("bad words")."""

    sequences: tuple[tuple[int, ...], ...]

    def start(self, prompt: Sequence[int]) -> "CompletionState":
        by_length: dict[int, Followers] = {}
        for sequence in self.sequences:
            length = len(sequence) - 1
            by_length[length] = ngram_followers(sequence, len(sequence), by_length.get(length))
        return CompletionState(by_length, prompt)


class CompletionState:
    """Where the text ends with one of these beginnings, given by their length, the tokens that complete it are forbidden."""

    def __init__(self, completions: Mapping[int, Followers], text: Sequence[int]) -> None:
        self._completions = completions
        self._longest = max(completions, default=0)
        self._recent = last_tokens(text, self._longest)

    def advance(self, token: int) -> None:
        self._recent = last_tokens((*self._recent, token), self._longest)

    def fork(self) -> "CompletionState":
        return copy.copy(self)

    def mask(self, logits: Logits) -> None:
        for completions in self._matching():
            _forbid(logits, completions)

    def forbids(self, token: int) -> bool:
        return any(token in completions for completions in self._matching())

    def _matching(self) -> Iterable[frozenset[int]]:
        for length, followers in self._completions.items():
            yield followers.get(last_tokens(self._recent, length), frozenset())


class LengthRule(Protocol):
    """A rule that looks at nothing but the number of tokens before."""

    def mask_at(self, length: int, logits: Logits) -> None: ...

    def forbids_at(self, length: int, token: int) -> bool: ...


@dataclass
class LengthState:
    rule: LengthRule
    length: int

    def advance(self, token: int) -> None:
        self.length += 1

    def fork(self) -> "LengthState":
        return LengthState(self.rule, self.length)

    def mask(self, logits: Logits) -> None:
        self.rule.mask_at(self.length, logits)

    def forbids(self, token: int) -> bool:
        return self.rule.forbids_at(self.length, token)


@dataclass(frozen=True)
class MinLength:
    """No end token before the text, prompt included, has this many tokens."""

    length: int
    end_tokens: tuple[int, ...]

    def start(self, prompt: Sequence[int]) -> LengthState:
        return LengthState(self, len(prompt))

    def mask_at(self, length: int, logits: Logits) -> None:
        if length < self.length:
            _forbid(logits, self.end_tokens)

    def forbids_at(self, length: int, token: int) -> bool:
        return length < self.length and token in self.end_tokens


@dataclass(frozen=True)
class ForcedTokens:
    """The token at this position of the text is one of these: a language, a task, the last end token."""

    position: int
    token_ids: tuple[int, ...]

    def start(self, prompt: Sequence[int]) -> LengthState:
        return LengthState(self, len(prompt))

    def mask_at(self, length: int, logits: Logits) -> None:
        if length == self.position:
            logits[:] = -np.inf
            logits[_within(self.token_ids, logits)] = 0.0

    def forbids_at(self, length: int, token: int) -> bool:
        return length == self.position and token not in self.token_ids


@dataclass(frozen=True)
class SuppressedTokens:
    """Never chosen; with a position, only not chosen there."""

    token_ids: tuple[int, ...]
    position: int | None = None

    def start(self, prompt: Sequence[int]) -> LengthState:
        return LengthState(self, len(prompt))

    def mask_at(self, length: int, logits: Logits) -> None:
        if self.position in (None, length):
            _forbid(logits, self.token_ids)

    def forbids_at(self, length: int, token: int) -> bool:
        return self.position in (None, length) and token in self.token_ids


@dataclass(frozen=True)
class WhisperTimestamps:
    """Whisper's timestamps come in pairs and never go back; text is suppressed where time is more probable.

    Timestamp tokens are all ids above <|notimestamps|>. Source: openai/whisper, ApplyTimestampRules.

    Attributes:
        no_timestamps: the id of <|notimestamps|>.
        end_token: ids from here on are allowed where a pair must be closed.
        begin: the first position after the prompt, where a timestamp is due.
        max_initial: the latest first timestamp, in steps; None is any.
    """

    no_timestamps: int
    end_token: int
    begin: int = 0
    max_initial: int | None = None

    def start(self, prompt: Sequence[int]) -> "TimestampState":
        state = TimestampState(self, min(len(prompt), self.begin))
        for token in prompt[self.begin :]:
            state.advance(token)
        return state


@dataclass
class TimestampState:
    """What the rules need of a text: the kinds of the output's last two tokens, and its latest timestamp."""

    rule: WhisperTimestamps
    length: int
    last_is_time: bool = False
    ends_segment: bool = False  # a timestamp after text
    latest: int | None = None

    def advance(self, token: int) -> None:
        if self.length >= self.rule.begin:
            is_time, in_output = token > self.rule.no_timestamps, self.length > self.rule.begin
            self.ends_segment = is_time and in_output and not self.last_is_time
            self.last_is_time = is_time
            self.latest = token if is_time else self.latest
        self.length += 1

    def fork(self) -> "TimestampState":
        return copy.copy(self)

    def mask(self, logits: Logits) -> None:
        first = self.rule.no_timestamps + 1
        logits[self.rule.no_timestamps] = -np.inf
        for start, stop in self._forbidden():
            logits[start:stop] = -np.inf
        if _log_sum(logits[first:]) > logits[:first].max():
            logits[:first] = -np.inf

    def forbids(self, token: int) -> bool:
        ranges = self._forbidden()
        return token == self.rule.no_timestamps or any(
            start <= token and (stop is None or token < stop) for start, stop in ranges
        )

    def _forbidden(self) -> Iterable[tuple[int, int | None]]:
        """The ranges of ids that the text so far rules out; None is the end of the vocabulary."""
        first = self.rule.no_timestamps + 1
        if self.ends_segment:
            yield 0, self.rule.end_token  # the next segment begins, or the text ends
        elif self.last_is_time:
            yield first, None  # a segment has begun: text is due
        if self.latest is not None:
            yield first, self.latest + (not self.ends_segment)  # segments may touch, and are not empty
        if self.length == self.rule.begin:
            yield 0, first
            if self.rule.max_initial is not None:
                yield first + self.rule.max_initial + 1, None


def _forbid(logits: Logits, token_ids: Iterable[int]) -> None:
    logits[_within(token_ids, logits)] = -np.inf


def _within(token_ids: Iterable[int], logits: Logits) -> list[int]:
    """Those that the vocabulary has: configurations name tokens beyond it, which transformers ignores."""
    return [token for token in token_ids if 0 <= token < len(logits)]


def _log_sum(logits: Logits) -> float:
    """log Σ exp in float64; -inf where all are."""
    best = float(logits.max())
    return best if best == -np.inf else best + float(np.log(np.exp(logits.astype(np.float64) - best).sum()))


# Where two rules meet, the later has the last word: a forced token overrules a minimum length, a suppressed one a forced one.
ORDER: tuple[type, ...] = (
    RepetitionPenalty,
    NoRepeatNGram,
    SourceNoRepeatNGram,
    ForbiddenSequences,
    MinLength,
    ForcedTokens,
    SuppressedTokens,
    WhisperTimestamps,
)


def replaces(state: RuleState) -> bool:
    """Whether its mask now sets every logit anew, so that nothing earlier rules forbade is certain any more."""
    if not isinstance(state, LengthState) or not isinstance(state.rule, ForcedTokens):
        return False
    return state.length == state.rule.position


def in_order(rules: Sequence[LogitRule]) -> tuple[LogitRule, ...]:
    """The rules as transformers would apply them; rules of other kinds come last."""
    return tuple(sorted(rules, key=lambda rule: ORDER.index(type(rule)) if type(rule) in ORDER else len(ORDER)))


@dataclass(frozen=True)
class TokenRules:
    """What a model's generation configuration demands of every text, and rules that the caller adds.

    Attributes:
        forced_bos_token_id: the first token after the decoder's start token (BART; mBART's and NLLB's language).
        forced_eos_token_ids: the tokens of which one ends a text that reaches its length limit.
        begin_suppress_tokens: not the first of the output.
        min_length: no end before the text has so many tokens, prompt included.
        min_new_tokens: no end before the output has so many.
        forbidden_sequences: "bad words".
        source_no_repeat_ngram: no n-gram of this size is copied from the source; 0 is off.
        timestamps: Whisper's, to be moved to where a text's output begins; None applies no rule of time.
        given: the caller's own, after all others.
    """

    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forbidden_sequences: tuple[tuple[int, ...], ...] = ()
    source_no_repeat_ngram: int = 0
    timestamps: WhisperTimestamps | None = None
    given: tuple[LogitRule, ...] = ()

    @classmethod
    def of(
        cls, stated: GenerationRules, timestamps: bool = False, ends: bool = True, given: tuple[LogitRule, ...] = ()
    ) -> "TokenRules":
        """What the bundle states. `timestamps` asks for Whisper's; without `ends` no rule forces or delays an end.

        Raises OptionError for timestamps of a model that has none.
        """
        times = None
        if timestamps:
            if stated.no_timestamps_token_id is None or not stated.eos_token_ids:
                raise OptionError("This model has no timestamp tokens: only Whisper's do. Fix: leave timestamps out.")
            end, latest = stated.eos_token_ids[0], stated.max_initial_timestamp_index
            times = WhisperTimestamps(stated.no_timestamps_token_id, end, 0, latest)
        forced_end = stated.forced_eos_token_id
        return cls(
            forced_bos_token_id=stated.forced_bos_token_id,
            forced_eos_token_ids=() if forced_end is None or not ends else (forced_end,),
            begin_suppress_tokens=stated.begin_suppress_tokens,
            min_length=stated.min_length or 0,
            min_new_tokens=stated.min_new_tokens or 0,
            forbidden_sequences=stated.bad_words_ids,
            source_no_repeat_ngram=stated.encoder_no_repeat_ngram_size,
            timestamps=times,
            given=given,
        )

    def for_text(
        self, prompt_tokens: int, max_tokens: int, end_tokens: frozenset[int], source_ids: Sequence[int] = ()
    ) -> tuple[LogitRule, ...]:
        """Rules of a text that begins with `prompt_tokens` tokens and may grow to `max_tokens`, prompt included."""
        rules: list[LogitRule] = []
        least = max(self.min_length, prompt_tokens + self.min_new_tokens)
        if least > prompt_tokens and end_tokens:
            rules.append(MinLength(least, tuple(sorted(end_tokens))))
        if self.forbidden_sequences:
            ends = {(token,) for token in end_tokens}
            rules.append(ForbiddenSequences(tuple(s for s in self.forbidden_sequences if s not in ends)))
        if self.source_no_repeat_ngram:
            rules.append(SourceNoRepeatNGram(self.source_no_repeat_ngram, tuple(source_ids)))
        if self.forced_bos_token_id is not None:
            rules.append(ForcedTokens(1, (self.forced_bos_token_id,)))
        if self.forced_eos_token_ids:
            rules.append(ForcedTokens(max_tokens - 1, self.forced_eos_token_ids))
        if self.begin_suppress_tokens:
            after_forced = prompt_tokens == 1 and self.forced_bos_token_id is not None
            rules.append(SuppressedTokens(self.begin_suppress_tokens, prompt_tokens + after_forced))
        if self.timestamps is not None:
            rules.append(dataclasses.replace(self.timestamps, begin=prompt_tokens))
        return (*rules, *self.given)

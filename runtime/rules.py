"""Logit rules: which tokens may follow, given the tokens before them.

A rule changes one row of logits. Every row of a verify pass that is tested goes through all rules with the tokens on its
own path (prompt, output, ancestors in the tree), so a drafted token that a rule forbids has probability 0 and is
rejected like any other wrong guess. Names, meaning and order are those of transformers' logits processors.

`TokenRules` is what a model demands of every text; `for_text` turns it into rules once the text's lengths are known.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .bundle import GenerationRules
from .errors import OptionError

Logits = NDArray[np.float32]  # [V]


class LogitRule(Protocol):
    """One rule."""

    def apply(self, logits: Logits, text: Sequence[int]) -> None:
        """Change [V] logits in place; `text` holds all tokens before them."""
        ...


@dataclass(frozen=True)
class RepetitionPenalty:
    """Logits of tokens in the text are divided (or multiplied, when negative) by the penalty."""

    penalty: float

    def apply(self, logits: Logits, text: Sequence[int]) -> None:
        seen = np.asarray(text, dtype=np.int64)
        scores = logits[seen]
        logits[seen] = np.where(scores < 0, scores * self.penalty, scores / self.penalty)


@dataclass(frozen=True)
class NoRepeatNGram:
    """No n-gram of this size occurs twice in the text."""

    size: int

    def apply(self, logits: Logits, text: Sequence[int]) -> None:
        logits[_completions(text, text, self.size)] = -np.inf


@dataclass(frozen=True)
class SourceNoRepeatNGram:
    """No n-gram of this size is copied from the source, the encoder's input."""

    size: int
    source_ids: tuple[int, ...]

    def apply(self, logits: Logits, text: Sequence[int]) -> None:
        logits[_completions(self.source_ids, text, self.size)] = -np.inf


def _completions(tokens: Sequence[int], text: Sequence[int], size: int) -> NDArray[np.int64]:
    """Last tokens of the n-grams of `tokens` whose beginning is the end of `text`."""
    if len(tokens) < size or len(text) + 1 < size:
        return np.empty(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, np.int64), size)
    prefix = np.asarray(text[len(text) + 1 - size :], np.int64)
    found: NDArray[np.int64] = windows[(windows[:, :-1] == prefix).all(axis=1), -1]
    return found


@dataclass(frozen=True)
class ForbiddenSequences:
    """None of these token sequences is completed ("bad words")."""

    sequences: tuple[tuple[int, ...], ...]

    def apply(self, logits: Logits, text: Sequence[int]) -> None:
        for *prefix, last in self.sequences:
            if not prefix or list(text[-len(prefix) :]) == prefix:
                logits[last] = -np.inf


@dataclass(frozen=True)
class MinLength:
    """No end token before the text, prompt included, has this many tokens."""

    length: int
    end_tokens: tuple[int, ...]

    def apply(self, logits: Logits, text: Sequence[int]) -> None:
        if len(text) < self.length:
            logits[list(self.end_tokens)] = -np.inf


@dataclass(frozen=True)
class ForcedTokens:
    """At this position of the text stands one of these tokens: a language, a task, the last end token."""

    position: int
    token_ids: tuple[int, ...]

    def apply(self, logits: Logits, text: Sequence[int]) -> None:
        if len(text) == self.position:
            logits[:] = -np.inf
            logits[list(self.token_ids)] = 0.0


@dataclass(frozen=True)
class SuppressedTokens:
    """Never chosen; with a position, only not chosen there."""

    token_ids: tuple[int, ...]
    position: int | None = None

    def apply(self, logits: Logits, text: Sequence[int]) -> None:
        if self.position is None or len(text) == self.position:
            logits[list(self.token_ids)] = -np.inf


@dataclass(frozen=True)
class WhisperTimestamps:
    """Whisper's timestamps come in pairs and never go back; text is suppressed where time is more probable.

    Timestamp tokens are all ids above <|notimestamps|>. Source: openai/whisper, ApplyTimestampRules.

    Attributes:
        no_timestamps: the id of <|notimestamps|>.
        end_token: ids from here on may stand where a pair is to be closed.
        begin: first position behind the prompt, where a timestamp is due.
        max_initial: the latest first timestamp, in steps; None is any.
    """

    no_timestamps: int
    end_token: int
    begin: int = 0
    max_initial: int | None = None

    def apply(self, logits: Logits, text: Sequence[int]) -> None:
        first = self.no_timestamps + 1
        logits[self.no_timestamps] = -np.inf
        self._pair(logits, text[self.begin :], first)
        if len(text) == self.begin:
            logits[:first] = -np.inf
            if self.max_initial is not None:
                logits[first + self.max_initial + 1 :] = -np.inf
        if _log_sum(logits[first:]) > logits[:first].max():
            logits[:first] = -np.inf

    def _pair(self, logits: Logits, output: Sequence[int], first: int) -> None:
        """What the last two tokens and the last timestamp allow."""
        last_is_time = len(output) > 0 and output[-1] >= first
        ends_segment = last_is_time and len(output) >= 2 and output[-2] < first
        if ends_segment:
            logits[: self.end_token] = -np.inf  # the next segment begins, or the text ends
        elif last_is_time:
            logits[first:] = -np.inf  # a segment has begun: text is due
        latest = next((token for token in reversed(output) if token >= first), None)
        if latest is not None:
            logits[first : latest if ends_segment else latest + 1] = -np.inf  # segments may touch, and are not empty


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


def in_order(rules: Sequence[LogitRule]) -> tuple[LogitRule, ...]:
    """The rules as transformers would apply them; rules of other kinds come last."""
    return tuple(sorted(rules, key=lambda rule: ORDER.index(type(rule)) if type(rule) in ORDER else len(ORDER)))


@dataclass(frozen=True)
class TokenRules:
    """What a model's generation configuration demands of every text.

    Attributes:
        forced_bos_token_id: the first token behind the decoder's start token (BART; mBART's and NLLB's language).
        forced_eos_token_ids: the tokens of which one ends a text that reaches its length limit.
        begin_suppress_tokens: not the first of the output.
        min_length: no end before the text has so many tokens, prompt included.
        min_new_tokens: no end before the output has so many.
        forbidden_sequences: "bad words".
        source_no_repeat_ngram: no n-gram of this size is copied from the source; 0 is off.
        timestamps: Whisper's, to be moved to where a text's output begins; None leaves time alone.
    """

    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forbidden_sequences: tuple[tuple[int, ...], ...] = ()
    source_no_repeat_ngram: int = 0
    timestamps: WhisperTimestamps | None = None

    @classmethod
    def of(cls, stated: GenerationRules, timestamps: bool = False, ends: bool = True) -> "TokenRules":
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
        return tuple(rules)

"""One request and the sequence it becomes: all that the scheduler keeps of one text, from its prompt to its last token."""

import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .acceptance import NumpyRng
from .budget import Budget
from .drafters.base import Drafter, DraftSequence
from .errors import OptionError
from .graph import MAX_ROWS
from .rules import TokenRules
from .sampling import LogitRules, LogitState, SamplingOptions

FinishReason = Literal["end_token", "stop_string", "length", "cache_full", "cancelled", "error"]


class StopCondition(Protocol):
    """Ends a sequence before its limits do: stop strings, for which the scheduler knows too little of text."""

    def push(self, token_ids: Tokens[int]) -> int | None:
        """Take the next tokens. Once the sequence is to end, returns how many of all tokens pushed to keep; else None."""
        ...


@dataclass(frozen=True)
class Request:
    """What is to be decoded, and how.

    Attributes:
        prompt_ids: what the decoder starts from.
        max_new_tokens: the most tokens to add.
        sampling: how a token is chosen.
        rules: what the model demands of every text.
        end_tokens: those that end the text.
        drafter: None decodes plainly.
        draft_nodes: size of the draft tree; None leaves it to `budget`, or to the drafter's default where that is None.
        budget: decides how much of each draft is verified.
        acceptance: name of an acceptance rule; None takes the lossless one that fits the draft (see acceptance.RULES).
        source: what the encoder reads; None without an encoder.
        source_ids: the same in the tokens of the output, where there are such.
        hypothesis_ids: the output for an earlier, shorter source.
        stop: a further reason to end.
        logprobs: None for none; else this many alternatives with each token's log-probability.
        seed: of all that is drawn.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int = 128
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    rules: TokenRules = field(default_factory=TokenRules)
    end_tokens: frozenset[int] = frozenset()
    drafter: Drafter | None = None
    draft_nodes: int | None = None
    budget: Budget | None = None
    acceptance: str | None = None
    source: NDArray[Any] | None = field(default=None, repr=False)
    source_ids: tuple[int, ...] = ()
    hypothesis_ids: tuple[int, ...] = ()
    stop: StopCondition | None = None
    logprobs: int | None = None
    seed: np.random.SeedSequence = field(default_factory=np.random.SeedSequence)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise OptionError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if self.draft_nodes is not None and not 0 <= self.draft_nodes < MAX_ROWS:
            raise OptionError(f"draft_nodes must lie between 0 and {MAX_ROWS - 1}, got {self.draft_nodes}.")
        if self.logprobs is not None and self.logprobs < 0:
            raise OptionError(f"logprobs must be 0 (the chosen token alone) or more, got {self.logprobs}.")


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probabilities under the target's own distribution, before logit rules and temperature.

    Attributes:
        token_id, log_prob: of the token that was chosen.
        top: the most probable tokens and their log-probabilities, best first.
    """

    token_id: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Provisional:
    """Tokens that a short list decided, which the whole vocabulary has yet to check.

    Attributes:
        logits: the state of the logit rules before them.
        token_ids, hidden, confidences: each token, the hidden state [H] it was decided from, and how sure the list was.
    """

    logits: LogitState
    token_ids: list[int] = field(default_factory=list)
    hidden: list[NDArray[np.float32]] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)


@dataclass
class Clock:
    """Seconds of the rounds that a sequence took part in; rounds are shared with the other sequences of the batch."""

    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    decode_s: float = 0.0


class Sequence:
    """One text being decoded.

    Invariant: its state holds all its tokens but the last. The last, the root, is decided but not yet verified. The last few
    may be provisional: they are part of `token_ids`, and were reported to nobody.
    """

    def __init__(self, sequence_id: int, request: Request, max_tokens: int) -> None:
        """`max_tokens`: of prompt and output together, in this engine."""
        accept_seed, draft_seed = request.seed.spawn(2)
        self.id = sequence_id
        self.request = request
        self.max_tokens = min(max_tokens, len(request.prompt_ids) + request.max_new_tokens)
        self.draft = DraftSequence(
            sequence_id,
            list(request.prompt_ids),
            len(request.prompt_ids),
            request.sampling,
            draft_seed,
            request.source,
            request.source_ids,
            request.hypothesis_ids,
        )
        self.logits = self._logit_state()
        self.rng = NumpyRng(accept_seed)
        self.prefilled = 0  # tokens of the prompt
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.provisional: Provisional | None = None
        self.verify_calls = 0
        self.drafted_tokens = 0
        self.clock = Clock()
        self.added_at = time.perf_counter()

    def _logit_state(self) -> LogitState:
        request = self.request
        rules = request.rules.for_text(len(request.prompt_ids), self.max_tokens, request.end_tokens, request.source_ids)
        return LogitRules(request.sampling, rules).start(request.prompt_ids)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output so far."""
        return self.draft.token_ids

    @property
    def prompt_tokens(self) -> int:
        return self.draft.prompt_tokens

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def tokens_left(self) -> int:
        return self.max_tokens - len(self.token_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_tokens :]

    def append_provisionally(
        self, token_ids: Tokens[int], hidden: NDArray[np.float32], confidences: Tokens[float]
    ) -> Provisional:
        """Append what a short list decided from the rows of `hidden` [≥ n, H], up to the first limit.

        Returns all tokens that are provisional now.
        """
        if self.provisional is None:
            self.provisional, self.logits = Provisional(self.logits), self.logits.fork()
        taken = list(token_ids[: self.tokens_left])
        self.provisional.token_ids += taken
        self.provisional.hidden += list(hidden[: len(taken)])
        self.provisional.confidences += confidences[: len(taken)]
        self.token_ids.extend(taken)
        for token in taken:
            self.logits.advance(token)
        return self.provisional

    @property
    def may_end(self) -> bool:
        """Whether nothing may follow the last token, provisional or not."""
        return self.tokens_left == 0 or self.token_ids[-1] in self.request.end_tokens

    def take_back(self) -> Provisional | None:
        """Remove the provisional tokens, and return them; None where there are none."""
        taken, self.provisional = self.provisional, None
        if taken is not None:
            del self.token_ids[len(self.token_ids) - len(taken.token_ids) :]
            self.logits = taken.logits
        return taken

    def append(self, token_ids: Tokens[int]) -> list[int]:
        """Append up to the first limit that is met, and note which one it was. Returns the tokens that were appended."""
        taken = list(token_ids[: self.tokens_left])
        self.token_ids.extend(taken)
        kept = None if self.request.stop is None else self.request.stop.push(taken)
        if kept is not None:
            cut = self.new_tokens - kept
            del self.token_ids[len(self.token_ids) - cut :]
            self.finish_reason, taken = "stop_string", taken[: len(taken) - cut]
        elif taken[-1] in self.request.end_tokens:
            self.finish_reason = "end_token"
        elif self.tokens_left == 0:
            self.finish_reason = "length" if self.new_tokens >= self.request.max_new_tokens else "cache_full"
        for token in taken:
            self.logits.advance(token)
        return taken

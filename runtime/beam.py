"""Beam search: the few most probable texts in parallel, without speculation.

Scores, length penalty, early stopping and the order of ties are those of `transformers.generate(num_beams=n)`, so that a
checkpoint meant for beams (translation, summaries) gives the same text as there. One text at a time; its beams are the
rows of one batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import contract
from .errors import OptionError
from .graph import Engine
from .prefill import check_prompt, last_logits, prefill, run_decoder
from .rules import TokenRules
from .sampling import LogitRules, LogitState, SamplingOptions
from .states import State

NO_BEAM = -1e9  # score of a beam that is not there yet: all begin as copies of one prompt


@dataclass(frozen=True)
class BeamOptions:
    """How beams are searched.

    Attributes:
        num_beams: texts kept in parallel.
        length_penalty: a finished text's log-probability is divided by its length to this power; above 0 favours long ones.
        early_stopping: True ends with `num_beams` finished texts; False when, at the present length, none that still runs
            could get among them; "never" when none could at any length.
        renormalize: the rules' outcome is made a distribution again (Marian).
        max_new_tokens: the most tokens to add.
        sampling: for its logit rules; greedy.
        end_tokens: those that finish a text.
        rules: the model's.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    renormalize: bool = False
    max_new_tokens: int = 128
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    end_tokens: frozenset[int] = frozenset()
    rules: TokenRules = field(default_factory=TokenRules)

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise OptionError(f"num_beams must be at least 1, got {self.num_beams}.")
        if self.max_new_tokens < 1:
            raise OptionError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if self.early_stopping not in (True, False, "never"):
            raise OptionError(f"early_stopping must be True, False or 'never', got {self.early_stopping!r}.")
        if not self.sampling.greedy:
            raise OptionError(f"beam search does not sample: temperature must be 0, got {self.sampling.temperature}.")


@dataclass(frozen=True)
class Hypothesis:
    """A finished text: the new tokens, the end token included, and their log-probability under the length penalty."""

    token_ids: list[int]
    score: float


class Beams:
    """The search itself: no engine, no cache; log-probabilities in, moves of rows out."""

    def __init__(self, options: BeamOptions, max_new_tokens: int) -> None:
        count = options.num_beams
        self._options, self._longest = options, max_new_tokens
        self._scores = np.array([0.0] + [NO_BEAM] * (count - 1))
        self.outputs: list[list[int]] = [[] for _ in range(count)]  # each beam's new tokens
        self.finished: list[Hypothesis] = []  # best first
        self.done = False

    def advance(self, log_probs: NDArray[np.float64]) -> list[int]:
        """Take in [beams, V] log-probabilities of the next token; returns for each new beam the old one it continues."""
        options, count, length = self._options, self._options.num_beams, len(self.outputs[0]) + 1
        totals = (log_probs + self._scores[:, None]).reshape(-1)
        # So many that `num_beams` still run when each of them could end in every way.
        best = _best(totals, max(2, 1 + len(options.end_tokens)) * count)
        beams, tokens = np.divmod(best, log_probs.shape[1])
        ends = np.isin(tokens, list(options.end_tokens)) | (length >= self._longest)
        for i in np.flatnonzero(ends[:count]).tolist():
            self._finish([*self.outputs[beams[i]], int(tokens[i])], float(totals[best[i]]))
        running = _best(totals[best] + NO_BEAM * ends, count)
        self._scores = (totals[best] + NO_BEAM * ends)[running]
        self.outputs = [[*self.outputs[beams[i]], int(tokens[i])] for i in running.tolist()]
        self.done = bool(ends.all()) or self._settled(length)
        moves: list[int] = beams[running].tolist()
        return moves

    def _finish(self, token_ids: list[int], total: float) -> None:
        hypothesis = Hypothesis(token_ids, total / len(token_ids) ** self._options.length_penalty)
        ranked = sorted([*self.finished, hypothesis], key=lambda h: -h.score)
        self.finished = ranked[: self._options.num_beams]

    def _settled(self, length: int) -> bool:
        """No beam that still runs can get among the finished ones, as far as `early_stopping` looks."""
        if len(self.finished) < self._options.num_beams:
            return False
        if self._options.early_stopping is True:
            return True
        penalty = self._options.length_penalty
        reachable = self._longest if self._options.early_stopping == "never" and penalty > 0 else length
        return bool(self._scores[0] / reachable**penalty <= self.finished[-1].score)


def _best(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the `count` highest scores, falling; of equal ones the first comes first."""
    count = min(count, len(scores))
    least = np.partition(scores, -count)[-count]
    candidates = np.flatnonzero(scores >= least)
    return np.asarray(candidates[np.argsort(-scores[candidates], kind="stable")][:count])


def beam_search(
    engine: Engine, prompt: Sequence[int], options: BeamOptions, source: NDArray[Any] | None = None
) -> list[Hypothesis]:
    """The finished texts of one prompt, best first. `source`: what the encoder reads, see Engine.encode.

    Raises PromptError when the prompt is empty or too long for the cache, or for a source that the encoder cannot take.
    """
    check_prompt(prompt, engine.model)
    count = options.num_beams
    longest = min(engine.model.max_cache, len(prompt) + options.max_new_tokens)
    ids = _ids(engine, source)
    rules = LogitRules(options.sampling, options.rules.for_text(len(prompt), longest, options.end_tokens, ids))
    sources = None if source is None else engine.encode([source]).repeated(count)
    state = engine.graph("decoder").new_state(count, longest, sources)
    logits = np.repeat(last_logits(prefill(engine, state.row(0), prompt))[None], count, axis=0)
    state.gather([0] * count)
    beams, texts = Beams(options, longest - len(prompt)), [rules.start(prompt) for _ in range(count)]
    while True:
        rows = [_log_probs(row, text, options.renormalize) for row, text in zip(logits, texts, strict=True)]
        moves = beams.advance(np.stack(rows))
        if beams.done:
            return beams.finished
        state.gather(moves)
        texts = [texts[move].fork() for move in moves]
        for text, output in zip(texts, beams.outputs, strict=True):
            text.advance(output[-1])
        logits = _step(engine, state, [output[-1] for output in beams.outputs])


def _ids(engine: Engine, source: NDArray[Any] | None) -> list[int]:
    """The source's tokens; empty when it is no text."""
    token_ids: list[int] = [] if source is None or engine.model.source != "text" else source.tolist()
    return token_ids


def _step(engine: Engine, state: State, token_ids: Sequence[int]) -> NDArray[np.float32]:
    """[beams, V] logits after one more token in each row, which is committed."""
    one = np.ones((len(token_ids), 1, 1), np.bool_)
    positions = state.lengths[:, None].copy()
    outputs = run_decoder(engine, state, np.array(token_ids, np.int64)[:, None], positions, one, np.zeros_like(positions))
    for row in range(len(token_ids)):
        state.commit(row, [0])
    return np.asarray(outputs[contract.LOGITS][:, 0])


def _log_probs(logits: NDArray[np.float32], text: LogitState, renormalize: bool) -> NDArray[np.float64]:
    """[V] log-probabilities after the rules, which see log-probabilities as they do in transformers' beam search."""
    ruled = text.process(_log_softmax(logits.astype(np.float64)).astype(np.float32)).astype(np.float64)
    return _log_softmax(ruled) if renormalize else ruled


def _log_softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = scores - scores.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))

"""The decoding loop: draft, verify, accept, commit, for a batch of sequences that advance at their own pace.

Knows tokens and positions; knows nothing of text. With an empty tree a round is a plain decoding step, so plain and
speculative decoding are one code path.

Invariant: a sequence's cache holds all its tokens but the last. The last, the root, is decided but not yet verified.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .acceptance import Accepted, NumpyRng, Rng, accept, prune
from .budget import Budget
from .cache import KVCache
from .drafters.base import NO_HIDDEN, Drafter, DraftRequest, SourceReader
from .engine import MAX_ROWS, SLOT_STEP, Engine, StepOutput
from .errors import OptionError
from .prefill import check_prompts, prefill
from .rules import TokenRules
from .sampling import LogitRules, LogitState, SamplingOptions
from .tree import DraftTree, empty_tree

FinishReason = Literal["end_token", "stop_string", "length", "cache_full"]


@dataclass(frozen=True)
class LoopOptions:
    """How a batch is decoded.

    `draft_nodes` None leaves the tree's size to the tuned budget, of which `budgets` makes one per sequence, or to the
    drafter's own default where it makes none. `rules` are the model's. `hypotheses`, one per sequence, are what was decoded
    of earlier, shorter inputs: drafts for whoever wants them.
    """

    max_new_tokens: int = 128
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    end_tokens: frozenset[int] = frozenset()
    draft_nodes: int | None = None
    budgets: Callable[[], Budget | None] = lambda: None
    rules: TokenRules = field(default_factory=TokenRules)
    hypotheses: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise OptionError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if self.draft_nodes is not None and not 0 <= self.draft_nodes < MAX_ROWS:
            raise OptionError(f"draft_nodes must lie between 0 and {MAX_ROWS - 1}, got {self.draft_nodes}.")


@dataclass
class Text:
    """One text being decoded, and what was counted on the way."""

    row: int
    token_ids: list[int]
    prompt_tokens: int
    rules: LogitRules
    logits: LogitState  # after token_ids
    rng: Rng
    hidden: NDArray[np.float32]
    budget: Budget | None = None
    finish_reason: FinishReason | None = None
    verify_calls: int = 0
    drafted_tokens: int = 0

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens


@dataclass
class Clock:
    """Seconds spent in each part of the loop, for the whole batch."""

    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    decode_s: float = 0.0


class DecodingLoop:
    """Decodes one batch. Iterate over `rounds()`; between rounds the caller may set a sequence's finish_reason.

    `sources`: what the encoder reads for each sequence, see Engine.encode; the prompts are then what the decoder starts from.
    """

    def __init__(
        self,
        engine: Engine,
        drafter: Drafter | None,
        prompts: Sequence[Sequence[int]],
        options: LoopOptions,
        sources: Sequence[NDArray[Any]] = (),
    ) -> None:
        self._engine, self._drafter, self._options = engine, drafter, options
        self._prompts, self._sources = prompts, sources
        is_text = engine.model.source == "text"
        self._source_ids: list[list[int]] = [source.tolist() for source in sources] if is_text else [[] for _ in prompts]
        self.clock = Clock()
        self.sequences: list[Text] = []
        self._limit = engine.model.max_cache
        self._cache = self._new_cache()

    def _new_cache(self) -> KVCache:
        """Sized by prompts and options alone, so that plain and speculative decoding compute in equal shapes."""
        check_prompts(self._prompts, self._limit)
        longest = max(map(len, self._prompts))
        slots = min(self._limit, longest + self._options.max_new_tokens) + MAX_ROWS
        return self._engine.new_cache(len(self._prompts), -(-slots // SLOT_STEP) * SLOT_STEP)

    def rounds(self) -> Iterator[list[list[int]]]:
        """New token ids per sequence: first those the prompts decide, then those of each verify pass."""
        if self._drafter is not None:
            self._drafter.open(len(self._prompts))
        started = time.perf_counter()
        if self._sources:
            self._cache.cross = self._engine.encode(self._sources)
        if isinstance(self._drafter, SourceReader):
            self._drafter.read(self._sources, self._cache.cross)
        self.sequences = [self._start(row, list(prompt)) for row, prompt in enumerate(self._prompts)]
        self.clock.prefill_s = time.perf_counter() - started
        yield [s.token_ids[s.prompt_tokens :] for s in self.sequences]
        while any(s.finish_reason is None for s in self.sequences):
            started = time.perf_counter()
            emitted = self._round()
            self.clock.decode_s += time.perf_counter() - started
            yield emitted

    def _start(self, row: int, prompt: list[int]) -> Text:
        """Prefill one prompt and decide its first token. One at a time: prompts differ in length."""
        output = prefill(self._engine, self._cache.row(row), prompt)
        seed = self._options.sampling.seed
        seed = None if seed is None else seed + row
        budget = self._options.budgets() if self._options.draft_nodes is None else None
        hidden = self._hidden(output, 0, -1)
        rules = self._rules(row, prompt)
        sequence = Text(row, prompt, len(prompt), rules, rules.start(prompt), NumpyRng(seed), hidden, budget)
        first = accept(empty_tree(), output.scores(0), sequence.logits, sequence.rng, self._options.end_tokens)
        self._append(sequence, first.token_ids)
        return sequence

    def _rules(self, row: int, prompt: list[int]) -> LogitRules:
        options = self._options
        longest = min(self._limit, len(prompt) + options.max_new_tokens)
        rules = options.rules.for_text(len(prompt), longest, options.end_tokens, self._source_ids[row])
        return LogitRules(options.sampling, rules)

    def _round(self) -> list[list[int]]:
        trees = self._draft()
        output = self._verify(trees)
        emitted: list[list[int]] = [[] for _ in trees]
        for sequence, tree in zip(self.sequences, trees, strict=True):
            if sequence.finish_reason is None:
                scores, end_tokens = output.scores(sequence.row), self._options.end_tokens
                path = accept(tree, scores, sequence.logits, sequence.rng, end_tokens)
                emitted[sequence.row] = self._take(sequence, tree, path, output)
        return emitted

    def _draft(self) -> list[DraftTree]:
        """A tree per sequence, empty where it is finished or nothing can be proposed."""
        trees = [empty_tree() for _ in self.sequences]
        if self._drafter is None or self._options.draft_nodes == 0:
            return trees
        started = time.perf_counter()
        active = [s for s in self.sequences if s.finish_reason is None and not (s.budget is not None and s.budget.resting)]
        requests = [request for request in map(self._request, active) if request.max_depth > 0]
        if requests:
            for request, tree in zip(requests, self._drafter.propose(requests), strict=True):
                budget, tree = self.sequences[request.row].budget, prune(tree, self.sequences[request.row].logits)
                trees[request.row] = tree if budget is None else budget.cut(tree, len(request.token_ids))
        self.clock.draft_s += time.perf_counter() - started
        return trees

    def _request(self, sequence: Text) -> DraftRequest:
        assert self._drafter is not None
        nodes = self._options.draft_nodes
        if nodes is None:
            nodes = self._drafter.default_nodes if sequence.budget is None else sequence.budget.max_nodes
        # The target adds one token of its own behind the path, so a deeper path than this could not be used.
        tokens_left = min(self._limit - len(sequence.token_ids), self._options.max_new_tokens - sequence.new_tokens) - 1
        sampling, rules = self._options.sampling, tuple(sequence.rules.text_rules)
        row, hypotheses = sequence.row, self._options.hypotheses
        return DraftRequest(
            row,
            sequence.token_ids,
            sequence.hidden,
            nodes,
            tokens_left,
            sampling,
            sequence.prompt_tokens,
            rules,
            source_ids=self._source_ids[row],
            hypothesis_ids=hypotheses[row] if hypotheses else (),
        )

    def _verify(self, trees: list[DraftTree]) -> StepOutput:
        """One forward over every root and its tree; short trees are padded with rows that see only themselves."""
        rows = 1 + max(map(len, trees))
        token_ids = np.zeros((len(trees), rows), np.int64)
        depths = np.zeros((len(trees), rows), np.int64)
        mask = np.broadcast_to(np.eye(rows, dtype=np.bool_), (len(trees), rows, rows)).copy()
        for i, tree in enumerate(trees):
            used = len(tree) + 1
            token_ids[i, 0] = self.sequences[i].token_ids[-1]
            token_ids[i, 1:used] = tree.token_ids
            depths[i, :used] = tree.depths()
            mask[i, :used, :used] = tree.ancestor_mask()
        position_ids = np.minimum(self._cache.lengths[:, None] + depths, self._limit - 1)
        output_rows = np.broadcast_to(np.arange(rows), (len(trees), rows))
        started = time.perf_counter()
        output = self._engine.forward(self._cache, token_ids, position_ids, mask, output_rows)
        output.wait()
        self.clock.verify_s += time.perf_counter() - started
        return output

    def _take(self, sequence: Text, tree: DraftTree, path: Accepted, output: StepOutput) -> list[int]:
        """Commit the accepted rows and append their tokens; returns the tokens that were appended."""
        rows = [0, *(node + 1 for node in path.nodes)]
        if sequence.budget is not None:
            drafted = not sequence.budget.resting
            sequence.budget.observe(len(path.token_ids), len(tree), len(sequence.token_ids), drafted)
        self._cache.commit(sequence.row, rows)
        sequence.hidden = self._hidden(output, sequence.row, rows[-1])
        sequence.verify_calls += 1
        sequence.drafted_tokens += len(tree)
        return self._append(sequence, path.token_ids)

    def _hidden(self, output: StepOutput, sequence: int, row: int) -> NDArray[np.float32]:
        """The state that decided a root; not fetched for a drafter that has no use for it."""
        wanted = self._drafter is not None and self._drafter.reads_hidden
        return output.hidden_row(sequence, row) if wanted else NO_HIDDEN

    def _append(self, sequence: Text, token_ids: list[int]) -> list[int]:
        """Append up to the first limit that is met, and note which one it was."""
        room = min(self._options.max_new_tokens - sequence.new_tokens, self._limit - len(sequence.token_ids))
        taken = token_ids[:room]
        sequence.token_ids.extend(taken)
        for token in taken:
            sequence.logits.advance(token)
        if taken[-1] in self._options.end_tokens:
            sequence.finish_reason = "end_token"
        elif sequence.new_tokens >= self._options.max_new_tokens:
            sequence.finish_reason = "length"
        elif len(sequence.token_ids) >= self._limit:
            sequence.finish_reason = "cache_full"
        return taken

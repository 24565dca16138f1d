"""The scheduler: requests join and leave between rounds, each with its own sampling, rules, stops, drafter, budget and seed.

Knows tokens and positions; knows nothing of text. With an empty tree a round is a plain decoding step, so plain and
speculative decoding are one code path. With a short list (drafters.shortlist) tokens are decided provisionally, round by round,
and checked several at once. Nothing here is locked: a scheduler belongs to one thread at a time (see Model).
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from . import contract
from .acceptance import Accepted, accept, prune
from .budget import Draft, share
from .drafters.base import Drafter, DraftRequest, Target
from .drafters.shortlist import ShortlistDrafter
from .errors import HeadstartError
from .graph import Engine, Outputs, Scores, SplitDecoder
from .log_probs import log_probs
from .prefill import CHUNK, check_prompt, decoder_inputs, prompt_chunk
from .sequence import FinishReason, Provisional, Request, Sequence, TokenLogProbs
from .slots import SlotTable, slots_of
from .tree import DraftTree, chain, empty_tree
from .verify_cost import CostModel, Curve, RunningCost

MAX_BATCH = 16  # sequences decoded together; more gain little and wait longer for their tokens


@dataclass(frozen=True)
class Event:
    """What a step did for one request.

    Attributes:
        id: of the request.
        token_ids: appended to its output.
        log_probs: of these tokens, where the request asked for them.
        finish_reason: None while it goes on.
        error: why it ended, for the reason "error"; the other requests go on.
    """

    id: int
    token_ids: tuple[int, ...] = ()
    log_probs: tuple[TokenLogProbs, ...] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None


class Scheduler:
    """Decodes any number of requests on one engine."""

    def __init__(self, engine: Engine, cost: CostModel | None = None, max_batch: int = MAX_BATCH) -> None:
        """`cost`: t(B, n) as tuned; learned from the passes where None. `max_batch`: sequences decoded together."""
        self._engine = engine
        self.cost: CostModel = cost or RunningCost()
        self._table = SlotTable(engine, max_batch)
        self._decoder = engine.graph("decoder")
        # Tokens are taken back by rewinding, which recurrent states do not keep enough for.
        self._lm_head: SplitDecoder | None = None
        if isinstance(self._decoder, SplitDecoder) and not self._decoder.info.recurrent:
            self._lm_head = self._decoder
        self._waiting: deque[Sequence] = deque()
        self._filling: Sequence | None = None  # the one whose prompt is being read; its row is the last
        self._sequences: dict[int, Sequence] = {}
        self._ids = itertools.count()
        self._events: dict[int, Event] = {}

    def add(self, request: Request) -> int:
        """Queue a request; returns its id. Raises PromptError for a prompt that is empty or does not fit the cache."""
        check_prompt(request.prompt_ids, self._engine.model)
        sequence = Sequence(next(self._ids), request, self._engine.model.max_cache)
        self._sequences[sequence.id] = sequence
        self._waiting.append(sequence)
        return sequence.id

    def cancel(self, request_id: int) -> None:
        """End a request; the next step reports it. No-op for one that has ended."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"

    def sequence(self, request_id: int) -> Sequence:
        """A request's sequence, until `forget`."""
        return self._sequences[request_id]

    def forget(self, request_id: int) -> None:
        """Drop what is kept of a request; one that still runs is cancelled."""
        self.cancel(request_id)
        self._retire()
        self._sequences.pop(request_id, None)
        self._events.pop(request_id, None)

    @property
    def max_batch(self) -> int:
        """Sequences decoded together; an engine may have been built for fewer than were asked for."""
        return self._table.most

    @property
    def idle(self) -> bool:
        """No request waits or runs."""
        return not (self._waiting or self._table.sequences)

    def step(self) -> list[Event]:
        """One round: read up to CHUNK rows of waiting prompts, then draft, verify, accept and commit for all that decode.

        An error that concerns one request ends that one. Raises what the engine raises, after ending every running request.
        """
        self._retire()
        try:
            self._read_prompts()
            running = [s for s in self._table.sequences if s is not self._filling and s.finish_reason is None]
            if running:
                self._round(running)
        except Exception as error:
            self._fail(error)
            raise
        finally:
            self._retire()
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events = list(self._events.values())
        self._events = {}
        return events

    def _fail(self, error: Exception) -> None:
        """The engine failed: no running sequence can go on."""
        for sequence in self._table.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason, sequence.error = "error", error

    def _retire(self) -> None:
        """Free what ended sequences hold, and report their end."""
        ended = [s for s in (*self._table.sequences, *self._waiting) if s.finish_reason is not None]
        if not ended:
            return
        if self._filling in ended:
            self._filling = None
        self._waiting = deque(s for s in self._waiting if s.finish_reason is None)
        self._table.leave({sequence.id for sequence in ended}, self._filling)
        for sequence in ended:
            sequence.take_back()
            if sequence.request.drafter is not None:
                sequence.request.drafter.close(sequence.draft)
            self._report(sequence)

    def _report(self, sequence: Sequence, token_ids: Iterable[int] = (), log_probs: Iterable[TokenLogProbs] = ()) -> None:
        """Add to what this step reports of a sequence."""
        event = self._events.get(sequence.id, Event(sequence.id))
        tokens, probs = (*event.token_ids, *token_ids), (*event.log_probs, *log_probs)
        self._events[sequence.id] = Event(sequence.id, tokens, probs, sequence.finish_reason, sequence.error)

    def _read_prompts(self) -> None:
        """Up to CHUNK rows, so that sequences that decode wait no longer than that for their next tokens."""
        rows = CHUNK
        while rows > 0:
            if self._filling is None:
                self._retire()  # a prompt may have ended at its first token
                self._filling = self._admit()
            if self._filling is None:
                return
            rows -= self._read_chunk(self._filling)

    def _admit(self) -> Sequence | None:
        """The first waiting sequence, with a row of its own and its source encoded; None where there is none, or no room."""
        if not self._waiting or not self._table.has_room(self._waiting[0]):
            return None
        if not self._table.sequences:  # room at once for all that could run together
            self._table.reserve(min(len(self._waiting), self._table.most), max(map(slots_of, self._waiting)))
        sequence, started = self._waiting.popleft(), time.perf_counter()
        try:
            sources = None if sequence.request.source is None else self._engine.encode([sequence.request.source])
        except HeadstartError as error:  # a source that the encoder does not take
            sequence.finish_reason, sequence.error = "error", error
            self._report(sequence)
            return self._admit()
        self._table.join(sequence, sources)
        if sequence.request.drafter is not None:
            sequence.request.drafter.open(sequence.draft, Target(self._engine, sources))
        sequence.clock.prefill_s += time.perf_counter() - started
        return sequence

    def _read_chunk(self, sequence: Sequence) -> int:
        """Run the next part of a prompt; the last part decides the first token. Returns its rows."""
        started = time.perf_counter()
        state = self._table.state.row(self._table.row_of(sequence))
        chunk = sequence.token_ids[sequence.prefilled : sequence.prefilled + CHUNK]
        outputs = prompt_chunk(self._engine, state, chunk)
        self._observe(sequence, outputs, 0, range(len(chunk)), chunk)
        sequence.prefilled += len(chunk)
        if sequence.prefilled == sequence.prompt_tokens:
            self._filling = None
            self._decide(sequence, empty_tree(), outputs.scores(0))
        sequence.clock.prefill_s += time.perf_counter() - started
        return len(chunk)

    def _round(self, running: list[Sequence]) -> None:
        shortlist = self._usable_shortlist(running)
        if shortlist is not None and shortlist.pace.begin_round():
            self._provisional_round(running[0], shortlist)
            return
        for row, sequence in enumerate(running):
            self._check(row, sequence)
        if all(sequence.finish_reason is None for sequence in running):
            self._whole_round(running)

    def _whole_round(self, running: list[Sequence]) -> None:
        """Every token is decided with the whole vocabulary at once."""
        started = time.perf_counter()
        curve = self.cost.curve(len(running), sum(len(s.token_ids) for s in running) // len(running))
        trees = self._draft(running, curve)
        drafted = time.perf_counter()
        outputs = self._verify(running, trees)
        verified = time.perf_counter()
        self.cost.observe(len(running), 1 + max(map(len, trees)), 1000 * (verified - drafted))
        for row, (sequence, tree) in enumerate(zip(running, trees, strict=True)):
            self._advance(sequence, tree, outputs, row, curve)
        ended = time.perf_counter()
        for sequence in running:
            sequence.clock.draft_s += drafted - started
            sequence.clock.verify_s += verified - drafted
            sequence.clock.decode_s += ended - started

    def _usable_shortlist(self, running: list[Sequence]) -> ShortlistDrafter | None:
        """Of a sequence that decodes alone and greedily: batches have rows enough, and samples may be any token."""
        request, drafter = running[0].request, running[0].request.drafter
        if len(running) > 1 or self._lm_head is None or not isinstance(drafter, ShortlistDrafter):
            return None
        fits = request.sampling.greedy and request.acceptance in (None, "greedy")
        return drafter if fits and running[0].tokens_left > 0 else None

    def _provisional_round(self, sequence: Sequence, drafter: ShortlistDrafter) -> None:
        """Draft, run the decoder without its LM head, and accept what the short list says; check when enough has gathered."""
        started, root = time.perf_counter(), sequence.token_ids[-1]
        curve = drafter.cost.curve(1, len(sequence.token_ids))
        tree = self._draft([sequence], curve)[0]
        drafted = time.perf_counter()
        outputs = self._verify([sequence], [tree], scored=False)
        hidden = outputs.rows(contract.HIDDEN, 0, range(1 + len(tree)))
        scores = drafter.scores(sequence.draft, hidden)
        verified = time.perf_counter()
        drafter.cost.observe(1, 1 + len(tree), 1000 * (verified - drafted))
        try:
            path = accept(tree, scores, sequence.logits, sequence.rng, sequence.request.end_tokens)
        except HeadstartError:  # the rules leave no token of the list
            drafter.pace.rest()
            return
        kept = [0, *(node + 1 for node in path.nodes)]
        self._table.state.commit(0, kept)
        confidences = [scores.confidence(row) for row in kept[: len(path.token_ids)]]
        provisional = sequence.append_provisionally(path.token_ids, hidden[kept], confidences)
        self._count(sequence, tree, path, curve)
        self._observe(sequence, outputs, 0, kept, [root, *path.token_ids[: len(path.nodes)]])
        drafter.pace.gathered(len(path.token_ids), 1000 * (time.perf_counter() - started))
        sequence.clock.draft_s += drafted - started
        sequence.clock.verify_s += verified - drafted
        if sequence.may_end or drafter.pace.enough(provisional.confidences):
            self._check(0, sequence)
        sequence.clock.decode_s += time.perf_counter() - started

    def _check(self, row: int, sequence: Sequence) -> None:
        """Let the whole LM head accept of a sequence's provisional tokens what it accepts of a chain that was drafted."""
        provisional, drafter = sequence.take_back(), sequence.request.drafter
        if provisional is None:
            return
        assert self._lm_head is not None and isinstance(drafter, ShortlistDrafter)
        started, known = time.perf_counter(), len(sequence.token_ids)
        scores = self._lm_head.score(np.stack(provisional.hidden))
        seconds = time.perf_counter() - started
        drafted = provisional.token_ids[:-1]
        path = self._decide(sequence, chain(drafted, [0.0] * len(drafted)), scores)
        if path is None:
            return
        missed = path.token_ids != provisional.token_ids
        drafter.pace.checked(provisional.confidences, len(path.token_ids), missed, 1000 * seconds)
        sequence.clock.verify_s += seconds
        if sequence.finish_reason is None:
            self._table.state.rewind(row, len(sequence.token_ids) - 1)
            if missed:
                self._take_back(sequence, drafter, known, provisional)

    def _take_back(self, sequence: Sequence, drafter: ShortlistDrafter, known: int, provisional: Provisional) -> None:
        """Let a drafter know that the text has only `known` tokens of those that it saw, and others after them."""
        drafter.taken_back(sequence.draft, known)
        decided = len(sequence.token_ids) - known
        if drafter.reads:
            hidden = np.stack(provisional.hidden[:decided])
            drafter.observe(sequence.draft, {contract.HIDDEN: hidden}, sequence.token_ids[known - 1 : -1])

    def _draft(self, running: list[Sequence], curve: Curve) -> list[DraftTree]:
        """A tree per sequence, cut to what pays; empty where nothing can be proposed, or where the drafter rests."""
        wanted: dict[Drafter, list[int]] = {}
        for row, sequence in enumerate(running):
            if sequence.request.drafter is not None and self._wants_draft(sequence):
                wanted.setdefault(sequence.request.drafter, []).append(row)
        drafts = [Draft(empty_tree()) for _ in running]
        for drafter, rows in wanted.items():
            for row, tree in zip(rows, drafter.propose([self._draft_request(running[row]) for row in rows]), strict=True):
                drafts[row] = self._draft_of(running[row], prune(tree, running[row].logits), curve)
        return share(drafts, curve)

    def _wants_draft(self, sequence: Sequence) -> bool:
        request, budget = sequence.request, sequence.request.budget
        if request.draft_nodes == 0 or sequence.tokens_left < 2:  # the target adds one token of its own after the path
            return False
        resting = request.draft_nodes is None and budget is not None and budget.resting
        return not resting or (budget is not None and budget.wants_shadow(sequence.token_ids))

    def _draft_of(self, sequence: Sequence, tree: DraftTree, curve: Curve) -> Draft:
        """The tree under the sequence's budget; a resting drafter's is only followed."""
        request = sequence.request
        if request.budget is None or request.draft_nodes is not None:
            return Draft(tree)
        if request.budget.resting:
            request.budget.shadow(tree, sequence.token_ids, float(curve[1]))
            return Draft(empty_tree())
        return Draft(tree, request.budget)

    def _draft_request(self, sequence: Sequence) -> DraftRequest:
        request = sequence.request
        assert request.drafter is not None
        nodes = request.draft_nodes
        if nodes is None:
            nodes = request.drafter.default_nodes if request.budget is None else request.budget.max_nodes
        return DraftRequest(sequence.draft, sequence.logits, nodes, sequence.tokens_left - 1)

    def _verify(self, running: list[Sequence], trees: list[DraftTree], scored: bool = True) -> Outputs:
        """One pass over every root and its tree; short trees are padded with rows that see only themselves.

        `scored`: with logits.
        """
        rows = 1 + max(map(len, trees))
        token_ids = np.zeros((len(trees), rows), np.int64)
        depths = np.zeros((len(trees), rows), np.int64)
        mask = np.broadcast_to(np.eye(rows, dtype=np.bool_), (len(trees), rows, rows)).copy()
        for i, (sequence, tree) in enumerate(zip(running, trees, strict=True)):
            used = len(tree) + 1
            token_ids[i, 0] = sequence.token_ids[-1]
            token_ids[i, 1:used] = tree.token_ids
            depths[i, :used] = tree.depths()
            mask[i, :used, :used] = tree.ancestor_mask()
        lengths = self._table.state.lengths[: len(running), None]
        positions = np.minimum(lengths + depths, self._engine.model.max_cache - 1)
        chosen = np.broadcast_to(np.arange(rows), (len(trees), rows))
        inputs, state = decoder_inputs(token_ids, positions, chosen), self._table.state.first(len(running))
        run = self._decoder.run if scored or self._lm_head is None else self._lm_head.run_body
        outputs = run(inputs, state, mask)
        outputs.wait()
        return outputs

    def _advance(self, sequence: Sequence, tree: DraftTree, outputs: Outputs, row: int, curve: Curve) -> None:
        """Accept, commit and append for one sequence of the round."""
        root = sequence.token_ids[-1]
        path = self._decide(sequence, tree, outputs.scores(row))
        if path is None:
            return
        kept = [0, *(node + 1 for node in path.nodes)]
        self._table.state.commit(row, kept)
        self._count(sequence, tree, path, curve)
        if sequence.finish_reason is None:
            self._observe(sequence, outputs, row, kept, [root, *path.token_ids[: len(path.nodes)]])

    def _count(self, sequence: Sequence, tree: DraftTree, path: Accepted, curve: Curve) -> None:
        """What a pass brought, for the statistics and the budget."""
        sequence.verify_calls += 1
        sequence.drafted_tokens += len(tree)
        budget = None if sequence.request.draft_nodes is not None else sequence.request.budget
        if budget is not None:
            milliseconds, plain = float(curve[1 + len(tree)]), float(curve[1])
            budget.observe(len(path.token_ids), milliseconds, plain, drafted=not budget.resting)

    def _decide(self, sequence: Sequence, tree: DraftTree, scores: Scores) -> Accepted | None:
        """Accept a path and append its tokens. None where the request's own rules leave no token: that ends it alone."""
        request = sequence.request
        try:
            path = accept(tree, scores, sequence.logits, sequence.rng, request.end_tokens, request.acceptance)
        except HeadstartError as error:
            sequence.finish_reason, sequence.error = "error", error
            self._report(sequence)
            return None
        appended = sequence.append(path.token_ids)
        rows = [0, *(node + 1 for node in path.nodes)]
        self._report(sequence, appended, log_probs(request.logprobs, appended, rows, scores))
        return path

    def _observe(self, sequence: Sequence, outputs: Outputs, row: int, rows: Iterable[int], tokens: list[int]) -> None:
        """Hand the drafter the features that it reads of newly committed rows."""
        drafter = sequence.request.drafter
        if drafter is not None and drafter.reads:
            chosen = list(rows)
            drafter.observe(sequence.draft, {name: outputs.rows(name, row, chosen) for name in drafter.reads}, tokens)


def decode_alone(engine: Engine, request: Request, cost: CostModel | None = None) -> Sequence:
    """Decode one request to its end with a scheduler of its own. `cost`: see Scheduler. Raises the request's own error."""
    scheduler = Scheduler(engine, cost)
    sequence = scheduler.sequence(scheduler.add(request))
    while not scheduler.idle:
        scheduler.step()
    if sequence.error is not None:
        raise sequence.error
    return sequence

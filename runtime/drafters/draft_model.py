"""A draft model: a smaller exported model with the target's vocabulary proposes a chain (arXiv 2211.17192, 2302.01318).

Where the target has an encoder the draft model has one too, and reads the same source with it, once. An assistant
(Distil-Whisper, arXiv 2311.00430) was trained on the target's own encoder: it is exported without one, and reads the
states that the target's encoder computed. The draft model's own state follows the text by comparing tokens: whatever the
target rejected is rewound before the next draft.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.acceptance import NumpyRng
from headstart.runtime.graph import MAX_ROWS, Engine
from headstart.runtime.prefill import last_logits, prefill
from headstart.runtime.states import CrossState, State
from headstart.runtime.tree import DraftTree, chain, empty_tree

from .base import DraftRequest, DraftSequence, Features, PriceMeter, Target

SLOT_STEP = 256  # states grow to multiples of this


@dataclass
class _Follower:
    """The draft model's view of one sequence.

    Attributes:
        sources: encoded, where the draft model reads any.
        rng: repeatable with the user's seed, from a stream of its own: drafts must not share the acceptance tests' draws.
        state: its keys and values; None before the first draft.
        fed: the tokens whose keys and values are in `state`.
    """

    sources: CrossState | None
    rng: NumpyRng
    state: State | None = None
    fed: list[int] = field(default_factory=list)


class DraftModelDrafter:
    """Family C without features. Greedy requests get greedy drafts; sampled ones get samples and their distributions.

    A node's class is its depth. Every node costs a step of the draft model, so tuning also decides how deep drafting pays:
    its rates are zero beyond.
    """

    default_nodes = 4
    reads: frozenset[str] = frozenset()
    class_count = 32

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self._engine = engine
        self._followers: dict[int, _Follower] = {}
        self._deepest = self.class_count
        self._step_meter = PriceMeter()

    def prior_rates(self) -> list[float]:
        return [0.7] * self.class_count

    def use_rates(self, rates: Sequence[float]) -> None:
        self._deepest = sum(rate > 0 for rate in rates)

    def open(self, sequence: DraftSequence, target: Target) -> None:
        self._followers[sequence.id] = _Follower(self._encoded(sequence.source, target), NumpyRng(sequence.seed))

    def _encoded(self, source: NDArray[Any] | None, target: Target) -> CrossState | None:
        if source is None:
            return None
        if self._engine.model.source == "states":
            assert target.sources is not None
            return self._engine.encode(target.sources.states())
        return self._engine.encode([source])

    def observe(self, sequence: DraftSequence, rows: Features, path: Sequence[int]) -> None:
        """No-op: the state catches up with the text when a draft is wanted."""

    def price(self, nodes: int, depth: int) -> float:
        return self._step_meter.milliseconds * min(nodes, depth, self._deepest)

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        return [self._draft(request) for request in requests]

    def taken_back(self, sequence: DraftSequence, known: int) -> None:
        """No-op: the state catches up with whatever the text is."""

    def close(self, sequence: DraftSequence) -> None:
        self._followers.pop(sequence.id, None)

    def _draft(self, request: DraftRequest) -> DraftTree:
        tokens, follower = request.sequence.token_ids, self._followers[request.sequence.id]
        room = self._engine.model.max_cache - len(tokens)  # the draft model's own limit may be the shorter one
        steps = min(request.max_nodes, request.max_depth, room, self._deepest)
        if steps <= 0:
            return empty_tree()
        with self._step_meter.measure(steps):
            drafted, distributions = self._chain(request, follower, steps)
        log_probs = [float(np.log(max(q[t], 1e-30))) for q, t in zip(distributions, drafted, strict=True)]
        tree = chain(drafted, log_probs)
        drawn = None if request.logits.options.greedy else np.stack(distributions)
        return DraftTree(tree.token_ids, tree.parents, tree.log_probs, drawn, np.arange(len(drafted), dtype=np.int64))

    def _chain(self, request: DraftRequest, follower: _Follower, steps: int) -> tuple[list[int], list[NDArray[np.float64]]]:
        """`steps` tokens, each from the draft model's own distribution under the request's rules, and those distributions."""
        rules, greedy = request.logits.fork(), request.logits.options.greedy
        logits = self._catch_up(follower, request.sequence.token_ids)
        drafted: list[int] = []
        distributions: list[NDArray[np.float64]] = []
        for step in range(steps):
            probabilities = rules.probabilities(logits)
            token = int(probabilities.argmax()) if greedy else follower.rng.choose(probabilities)
            drafted.append(token)
            distributions.append(probabilities)
            rules.advance(token)
            if step + 1 < steps:
                logits = self._feed(follower, [token])
        return drafted, distributions

    def _catch_up(self, follower: _Follower, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Make the state hold exactly `tokens`; returns the logits [V] after the last."""
        fed, common = follower.fed, 0
        while common < min(len(fed), len(tokens) - 1) and fed[common] == tokens[common]:
            common += 1
        self._make_room(follower, len(tokens)).rewind(0, common)
        del fed[common:]
        return self._feed(follower, tokens[common:])

    def _make_room(self, follower: _Follower, tokens: int) -> State:
        """The sequence's state with room for the text and a draft; grown by copying."""
        slots = -(-(tokens + MAX_ROWS + SLOT_STEP) // SLOT_STEP) * SLOT_STEP
        slots = min(slots, self._engine.model.max_cache + MAX_ROWS)
        if follower.state is None:
            follower.state = self._engine.graph("decoder").new_state(1, slots, follower.sources)
        elif follower.state.slots < tokens + MAX_ROWS:
            follower.state = follower.state.resized(1, slots)
        return follower.state

    def _feed(self, follower: _Follower, tokens: Sequence[int]) -> NDArray[np.float32]:
        assert follower.state is not None
        outputs = prefill(self._engine, follower.state, tokens)
        follower.fed.extend(tokens)
        return last_logits(outputs)

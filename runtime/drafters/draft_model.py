"""A draft model: a smaller exported model with the target's vocabulary proposes a chain (arXiv 2211.17192, 2302.01318).

Where the target has an encoder the draft model has one too, and reads the same source with it, once. An assistant
(Distil-Whisper, arXiv 2311.00430) was trained on the target's own encoder: it is exported without one, and reads the
states that the target's made.
Its own cache follows the text by comparing tokens: whatever the target rejected is rewound before the next draft.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.cache import CrossState, KVCache
from headstart.runtime.engine import MAX_ROWS, Engine
from headstart.runtime.prefill import prefill
from headstart.runtime.sampling import LogitRules
from headstart.runtime.tree import DraftTree, chain, empty_tree

from .base import DraftRequest

SLOT_STEP = 256  # caches grow to multiples of this


class DraftModelDrafter:
    """Family C without features. Greedy requests get greedy drafts; sampled ones get samples and their distributions.

    A node's class is its depth. Every node costs a step of the draft model, so tuning also says how deep drafting pays:
    its rates are zero beyond.
    """

    default_nodes = 4
    reads_hidden = False
    class_count = 32

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self._engine = engine
        self._generators: dict[int, np.random.Generator] = {}
        self._caches: dict[int, KVCache] = {}
        self._cross: list[CrossState] = []  # of each row, where sources are read
        self._fed: dict[int, list[int]] = {}  # tokens whose keys and values stand in each row's cache
        self._deepest = self.class_count

    def prior_rates(self) -> list[float]:
        return [0.7] * self.class_count

    def use_rates(self, rates: Sequence[float]) -> None:
        self._deepest = sum(rate > 0 for rate in rates)

    def open(self, batch: int) -> None:
        self._caches = {}
        self._generators = {}
        self._fed = {row: [] for row in range(batch)}
        self._cross = []

    def read(self, sources: Sequence[NDArray[Any]], cross: CrossState | None) -> None:
        if cross is not None and self._engine.model.source == "states":
            sources = cross.states()
        self._cross = [self._engine.encode([source]) for source in sources]

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        return [self._draft(request) for request in requests]

    def _draft(self, request: DraftRequest) -> DraftTree:
        tokens = list(request.token_ids)
        room = self._engine.model.max_cache - len(tokens)  # the draft model's own limit may be the shorter one
        steps = min(request.max_nodes, request.max_depth, room, self._deepest)
        if steps <= 0:
            return empty_tree()
        logits = self._catch_up(request.row, tokens)
        state = LogitRules(request.sampling, request.rules).start(tokens)
        drafted: list[int] = []
        distributions: list[NDArray[np.float64]] = []
        for step in range(steps):
            probabilities = state.probabilities(logits)
            greedy = request.sampling.greedy
            token = int(probabilities.argmax()) if greedy else self._draw(request, probabilities)
            drafted.append(token)
            state.advance(token)
            distributions.append(probabilities)
            if step + 1 < steps:
                logits = self._feed(request.row, [token])
        log_probs = [float(np.log(max(q[t], 1e-30))) for q, t in zip(distributions, drafted, strict=True)]
        tree = chain(drafted, log_probs)
        drawn = None if request.sampling.greedy else np.stack(distributions)
        return DraftTree(tree.token_ids, tree.parents, tree.log_probs, drawn, np.arange(len(drafted), dtype=np.int64))

    def _draw(self, request: DraftRequest, probabilities: NDArray[np.float64]) -> int:
        """Repeatable with the user's seed, from a stream of its own: drafts must not share the acceptance tests' draws."""
        if request.row not in self._generators:
            seed = request.sampling.seed
            self._generators[request.row] = np.random.default_rng(None if seed is None else (seed, request.row, 1))
        return int(self._generators[request.row].choice(len(probabilities), p=probabilities))

    def _catch_up(self, row: int, tokens: list[int]) -> NDArray[np.float32]:
        """Make the cache hold exactly `tokens`; returns the logits [V] after the last."""
        fed = self._fed[row]
        common = 0
        while common < min(len(fed), len(tokens) - 1) and fed[common] == tokens[common]:
            common += 1
        cache = self._cache(row, len(tokens))
        cache.rewind(0, common)
        del fed[common:]
        return self._feed(row, tokens[common:])

    def _cache(self, row: int, tokens: int) -> KVCache:
        """The row's cache with room for the text and a draft behind it; grown by copying."""
        needed = tokens + MAX_ROWS + SLOT_STEP
        cache = self._caches.get(row)
        if cache is None or cache.slots < tokens + MAX_ROWS:
            cross = self._cross[row] if self._cross else None
            most = self._engine.model.max_cache + MAX_ROWS
            grown = self._engine.new_cache(1, min(-(-needed // SLOT_STEP) * SLOT_STEP, most), cross)
            if cache is not None:
                for old, new in zip(cache.buffers, grown.buffers, strict=True):
                    new[:, :, : old.shape[2]] = old
                grown.lengths[:] = cache.lengths
            self._caches[row] = grown
        return self._caches[row]

    def _feed(self, row: int, tokens: list[int]) -> NDArray[np.float32]:
        output = prefill(self._engine, self._caches[row], tokens)
        self._fed[row].extend(tokens)
        return np.array(output.logits[0, 0])

"""Medusa heads: independent heads read the target's hidden state, one future token each (arXiv 2401.10774).

The graph returns each head's best candidates; the tree takes the most probable combinations of them. A head's own
probability is corrected by the measured acceptance of candidates of that depth and confidence.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.graph import Graph
from headstart.runtime.tree import DraftTree, tree_from_independent_levels

from .base import DraftRequest, DraftSequence, Features, PriceMeter, Target
from .confidence import Confidence


class MedusaDrafter:
    """Family A: parallel, stateless."""

    default_nodes = 12
    reads = frozenset({contract.HIDDEN})

    def __init__(self, name: str, graph: Graph, heads: int) -> None:
        """`graph`: hidden [B, 1, H] to topk_ids, topk_log_probs [B, heads, k]."""
        self.name = name
        self._graph = graph
        self._hidden: dict[int, NDArray[np.float32]] = {}  # of the row that decided each sequence's root, [1, H]
        self._meter = PriceMeter()
        self._confidence = Confidence(heads)
        self.class_count = self._confidence.class_count

    def use_rates(self, rates: Sequence[float]) -> None:
        self._confidence.use_rates(rates)

    def prior_rates(self) -> list[float]:
        return self._confidence.prior_rates()

    def open(self, sequence: DraftSequence, target: Target) -> None:
        """No-op: the first rows observed are the prompt's."""

    def observe(self, sequence: DraftSequence, rows: Features, path: Sequence[int]) -> None:
        self._hidden[sequence.id] = rows[contract.HIDDEN][-1:]

    def price(self, nodes: int, depth: int) -> float:
        return self._meter.milliseconds

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        with self._meter.measure(len(requests)):
            hidden = np.stack([self._hidden[request.sequence.id] for request in requests])
            outputs = self._graph.run({contract.HIDDEN: hidden})
            ids, log_probs = outputs[contract.TOPK_IDS], outputs[contract.TOPK_LOG_PROBS]
            return [self._tree(ids[i, : r.max_depth], log_probs[i, : r.max_depth], r) for i, r in enumerate(requests)]

    def taken_back(self, sequence: DraftSequence, known: int) -> None:
        """No-op: the row that decided the root comes next."""

    def close(self, sequence: DraftSequence) -> None:
        self._hidden.pop(sequence.id, None)

    def _tree(self, ids: NDArray[np.int64], log_probs: NDArray[np.float32], request: DraftRequest) -> DraftTree:
        classes = self._confidence.classes(log_probs, np.arange(len(ids))[:, None])
        return tree_from_independent_levels(ids, self._confidence.corrected(log_probs, classes), request.max_nodes, classes)

"""Medusa heads: independent heads read the target's hidden state, one future token each (arXiv 2401.10774).

The graph returns each head's best candidates; the tree takes the most probable combinations of them. A head's own
probability is corrected by the measured acceptance of candidates of that depth and confidence.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.tree import DraftTree, tree_from_independent_levels

from .base import DraftRequest
from .state_head import StateHead


class MedusaDrafter(StateHead):
    """Family A: parallel, stateless. Its graph: hidden [B, 1, H] to topk_ids, topk_log_probs [B, heads, k]."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        with self._meter.measure(len(requests)):
            outputs = self._graph.run({contract.HIDDEN: self._states(requests)})
            ids, log_probs = outputs[contract.TOPK_IDS], outputs[contract.TOPK_LOG_PROBS]
            return [self._tree(ids[i, : r.max_depth], log_probs[i, : r.max_depth], r) for i, r in enumerate(requests)]

    def _tree(self, ids: NDArray[np.int64], log_probs: NDArray[np.float32], request: DraftRequest) -> DraftTree:
        classes = self._confidence.classes(log_probs, np.arange(len(ids))[:, None])
        return tree_from_independent_levels(ids, self._confidence.corrected(log_probs, classes), request.max_nodes, classes)

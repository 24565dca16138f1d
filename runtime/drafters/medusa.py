"""Medusa heads: independent heads read the target's hidden state, one future token each (arXiv 2401.10774).

The graph returns each head's best candidates; the tree takes the most probable combinations of them.
"""

from collections.abc import Sequence

import numpy as np

from headstart.runtime.engine import Head
from headstart.runtime.tree import DraftTree, tree_from_independent_levels

from .base import DraftRequest


class MedusaDrafter:
    """Family A: parallel, stateless."""

    default_nodes = 12

    def __init__(self, name: str, head: Head) -> None:
        self.name = name
        self._head = head

    def open(self, batch: int) -> None:
        """Stateless: nothing to forget."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        hidden = np.stack([request.hidden for request in requests])[:, None]
        ids, log_probs = self._head.propose(hidden)
        return [
            tree_from_independent_levels(ids[i, : r.max_depth], log_probs[i, : r.max_depth], r.max_nodes)
            for i, r in enumerate(requests)
        ]

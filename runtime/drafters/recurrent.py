"""Heads that read what they drafted: Hydra (arXiv 2402.05109), recurrent drafting (2403.09919), MLP speculators (2404.19124).

One call of the head's graph drafts a tree, by beam search, from the hidden state that decided the root, and the root. The draft
is the tree's most probable nodes, as many as the budget pays for. Where the target's embeddings are read, those of drafted
tokens are the graph's own, and that of the root, which may be any token, comes from the bundle's table.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, HeadInfo
from headstart.runtime.graph import Graph
from headstart.runtime.token_rows import EMBEDDINGS, TokenTable
from headstart.runtime.tree import ROOT, DraftTree

from .base import DraftRequest
from .state_head import StateHead


class RecurrentDrafter(StateHead):
    """Family B: recurrent, or MLPs over a path."""

    def __init__(self, info: HeadInfo, graph: Graph, bundle: Bundle) -> None:
        """`graph`: see `contract.DRAFT_IDS`. `info.embeddings` says where the bundle's embeddings lie."""
        super().__init__(info.name, graph, info.heads)
        self._levels, self._root_input = info.heads, RootInput(bundle, info)

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        with self._meter.measure(len(requests)):
            roots = np.array([request.sequence.token_ids[-1] for request in requests], np.int64)
            outputs = self._graph.run({contract.HIDDEN: self._states(requests), **self._root_input.of(roots)})
            names = (contract.DRAFT_IDS, contract.DRAFT_PARENTS, contract.DRAFT_LOG_PROBS)
            ids, parents, log_probs = (outputs[name] for name in names)
            return [self._tree(ids[i], parents[i], log_probs[i], request) for i, request in enumerate(requests)]

    def _tree(
        self, ids: NDArray[np.int64], parents: NDArray[np.int64], paths: NDArray[np.float32], request: DraftRequest
    ) -> DraftTree:
        """The nodes that promise most, of all that were drafted."""
        depths = _along_paths(np.ones(len(ids), np.int64), parents, self._levels) - 1
        above = np.append(paths, np.float32(0))[parents]  # the last entry serves ROOT
        own = np.minimum(paths - above, np.float32(0))  # sums are rounded
        classes = self._confidence.classes(own, depths)
        promised = _along_paths(self._confidence.corrected(own, classes), parents, self._levels)
        allowed = np.flatnonzero(depths < request.max_depth)
        order = allowed[np.argsort(-promised[allowed], kind="stable")]  # parents before their children, which promise no more
        kept = np.sort(order[: request.max_nodes])
        numbers = np.full(len(ids) + 1, ROOT)
        numbers[kept] = np.arange(len(kept))
        return DraftTree(ids[kept], numbers[parents[kept]], promised[kept], classes=classes[kept])


class RootInput:
    """What a head's graph takes of roots: the target's embeddings of them, or the tokens."""

    def __init__(self, bundle: Bundle, head: HeadInfo) -> None:
        stored = head.embeddings
        self._table = TokenTable(bundle.path, stored, EMBEDDINGS, head.hidden_size) if stored else None

    def of(self, roots: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Of [B] tokens."""
        if self._table is None:
            return {contract.ROOT_IDS: roots[:, None]}
        return {contract.EMBEDDING: self._table.rows(roots).floats()[:, None]}


def _along_paths(values: NDArray[Any], parents: NDArray[np.int64], levels: int) -> NDArray[Any]:
    """[M] sums over each node's path from the root, of [M] values of nodes."""
    sums = values
    for _ in range(levels - 1):
        sums = values + np.append(sums, values.dtype.type(0))[parents]  # the last entry serves ROOT
    return sums

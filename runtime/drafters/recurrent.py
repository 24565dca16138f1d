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
from headstart.runtime.token_rows import EMBEDDINGS, token_rows
from headstart.runtime.tree import ROOT, DraftTree

from .base import DraftRequest, DraftSequence, Features, PriceMeter, Target
from .confidence import Confidence


class RecurrentDrafter:
    """Family B: recurrent, or MLPs over a path; no state from one draft to the next."""

    default_nodes = 12
    reads = frozenset({contract.HIDDEN})

    def __init__(self, info: HeadInfo, graph: Graph, bundle: Bundle) -> None:
        """`graph`: see `contract.DRAFT_IDS`. `info.embeddings` says where the bundle's embeddings lie."""
        self.name = info.name
        self._info, self._graph, self._bundle = info, graph, bundle
        self._hidden: dict[int, NDArray[np.float32]] = {}  # of the row that decided each sequence's root, [1, H]
        self._meter = PriceMeter()
        self._confidence = Confidence(info.heads)
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
            roots = np.array([request.sequence.token_ids[-1] for request in requests], np.int64)
            outputs = self._graph.run({contract.HIDDEN: hidden, **root_input(self._bundle, self._info, roots)})
            names = (contract.DRAFT_IDS, contract.DRAFT_PARENTS, contract.DRAFT_LOG_PROBS)
            ids, parents, log_probs = (outputs[name] for name in names)
            return [self._tree(ids[i], parents[i], log_probs[i], request) for i, request in enumerate(requests)]

    def taken_back(self, sequence: DraftSequence, known: int) -> None:
        """No-op: the row that decided the root comes next."""

    def close(self, sequence: DraftSequence) -> None:
        self._hidden.pop(sequence.id, None)

    def _tree(
        self, ids: NDArray[np.int64], parents: NDArray[np.int64], paths: NDArray[np.float32], request: DraftRequest
    ) -> DraftTree:
        """The nodes that promise most, of all that were drafted."""
        tree = DraftTree(ids, parents, paths)
        depths = tree.depths()[1:] - 1
        above = np.append(paths, np.float32(0))[parents]  # the last entry serves ROOT
        own = np.minimum(paths - above, np.float32(0))  # sums are rounded
        classes = self._confidence.classes(own, depths)
        corrected = _summed(self._confidence.corrected(own, classes), parents, depths)
        return DraftTree(ids, parents, corrected, classes=classes).best(request.max_nodes, request.max_depth)


def root_input(bundle: Bundle, head: HeadInfo, roots: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """What a head's graph takes of [B] roots: the target's embeddings of them, or the tokens."""
    if not head.embeddings:
        return {contract.ROOT_IDS: roots[:, None]}
    rows = token_rows(bundle.path, head.embeddings, EMBEDDINGS, head.hidden_size, roots)
    return {contract.EMBEDDING: rows.floats()[:, None]}


def _summed(log_probs: NDArray[np.float32], parents: NDArray[np.int64], depths: NDArray[np.int64]) -> NDArray[np.float32]:
    """[M] of whole paths, of nodes' own; level by level."""
    paths = np.append(log_probs, np.float32(0))  # one more for ROOT
    assert ROOT == -1
    for depth in range(1, int(depths.max(initial=0)) + 1):
        level = np.flatnonzero(depths == depth)
        paths[level] += paths[parents[level]]
    return paths[:-1]

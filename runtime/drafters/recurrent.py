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

from .base import DraftRequest, DraftSequence, Features, PriceMeter, Target
from .confidence import Confidence


class RecurrentDrafter:
    """Family B: recurrent, or MLPs over a path; no state from one draft to the next."""

    default_nodes = 12
    reads = frozenset({contract.HIDDEN})

    def __init__(self, info: HeadInfo, graph: Graph, bundle: Bundle) -> None:
        """`graph`: see `contract.DRAFT_IDS`. `info.embeddings` says where the bundle's embeddings lie."""
        self.name = info.name
        self._levels, self._graph, self._root_input = info.heads, graph, RootInput(bundle, info)
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
            outputs = self._graph.run({contract.HIDDEN: hidden, **self._root_input.of(roots)})
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

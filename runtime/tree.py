"""The draft tree: proposed tokens, their parents, and the path probability of each.

Knows the geometry (ancestors, depths, the rows of a verify pass); knows nothing of models or of acceptance.
Node `i` stands at row `i + 1` of the verify pass; row 0 is the root, the last token already decided.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

ROOT = -1  # parent of the nodes that follow the root directly


@dataclass(frozen=True)
class DraftTree:
    """N proposed tokens; every parent stands before its children.

    Attributes:
        token_ids: [N] int64.
        parents: [N] int64, index of the parent node or ROOT.
        log_probs: [N] float32, the drafter's log-probability of the whole path from the root to this node.
        draft_probs: [N, V] float64, the distribution that node's token was drawn from, for drafts that were sampled;
            None when the drafts are a deterministic function of the text so far. Siblings were drawn without
            replacement, in the order in which they stand, and all carry the first one's (unmodified) distribution.
        classes: [N] int64, the drafter's own classes of nodes, whose acceptance rates tuning measures.
    """

    token_ids: NDArray[np.int64]
    parents: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    draft_probs: NDArray[np.float64] | None = field(default=None, repr=False)
    classes: NDArray[np.int64] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.parents) == len(self.log_probs)
        assert all(ROOT <= parent < node for node, parent in enumerate(self.parents.tolist())), (
            "a parent stands before its children"
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    def children(self) -> list[list[int]]:
        """[N + 1] lists of nodes: the root's children first, then those of node 0, 1, …"""
        lists: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents.tolist()):
            lists[parent + 1].append(node)
        return lists

    def depths(self) -> NDArray[np.int64]:
        """[N + 1] depth of every row; the root has 0."""
        depths = np.zeros(len(self) + 1, dtype=np.int64)
        for node, parent in enumerate(self.parents.tolist()):
            depths[node + 1] = depths[parent + 1] + 1
        return depths

    def ancestor_mask(self) -> NDArray[np.bool_]:
        """[N + 1, N + 1] bool: row r may see column c when c is r or stands on r's path to the root."""
        mask = np.eye(len(self) + 1, dtype=np.bool_)
        for node, parent in enumerate(self.parents.tolist()):
            mask[node + 1] |= mask[parent + 1]
        return mask

    def best(self, nodes: int, max_depth: int) -> "DraftTree":
        """The subtree of the `nodes` most probable nodes no deeper than `max_depth`, in their present order.

        A parent is at least as probable as its children, and a stable sort keeps it before them, so the choice is closed.
        """
        allowed = np.flatnonzero(self.depths()[1:] <= max_depth)
        if len(allowed) <= nodes and len(allowed) == len(self):
            return self
        by_probability = allowed[np.argsort(-self.log_probs[allowed], kind="stable")]
        return self.subtree(np.sort(by_probability[:nodes]).tolist())

    def subtree(self, kept: Sequence[int]) -> "DraftTree":
        """The nodes `kept`, in rising order; every one's parent must be kept too."""
        if len(kept) == len(self):
            return self
        nodes = np.array(kept, np.int64)
        renumbered = np.full(len(self) + 1, ROOT)  # the last entry serves parent -1
        renumbered[nodes] = np.arange(len(nodes))
        probs = None if self.draft_probs is None else self.draft_probs[nodes]
        classes = None if self.classes is None else self.classes[nodes]
        return DraftTree(self.token_ids[nodes], renumbered[self.parents[nodes]], self.log_probs[nodes], probs, classes)


def empty_tree() -> DraftTree:
    """No proposal: the verify pass is then a plain decoding step."""
    return DraftTree(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


def chain(token_ids: list[int], log_probs: list[float]) -> DraftTree:
    """A tree of width 1. `log_probs` are per token and are accumulated here."""
    count = len(token_ids)
    return DraftTree(
        np.array(token_ids, np.int64), np.arange(count, dtype=np.int64) - 1, np.cumsum(log_probs, dtype=np.float32)
    )


def tree_from_independent_levels(
    token_ids: NDArray[np.int64],  # [K, k] candidates of each depth, best first
    log_probs: NDArray[np.float32],  # [K, k]
    nodes: int,
    classes: NDArray[np.int64] | None = None,  # [K, k]
) -> DraftTree:
    """The `nodes` most probable paths through K independent levels, taken best first (OPT-Tree, arXiv 2406.17276).

    Path probabilities are products of the levels', so a heap that pops the best node and pushes its first child and its
    next sibling visits them in falling order.
    """
    levels, width = token_ids.shape
    table = log_probs.tolist()
    tokens: list[int] = []
    parents: list[int] = []
    totals: list[float] = []
    places: list[tuple[int, int]] = []
    heap = [(-table[0][0], 0, 0, ROOT, 0.0)] if levels else []
    while heap and len(tokens) < nodes:
        negative, level, rank, parent, above = heapq.heappop(heap)
        node = len(tokens)
        tokens.append(int(token_ids[level, rank]))
        parents.append(parent)
        totals.append(-negative)
        places.append((level, rank))
        if rank + 1 < width:
            heapq.heappush(heap, (-(above + table[level][rank + 1]), level, rank + 1, parent, above))
        if level + 1 < levels:
            heapq.heappush(heap, (negative - table[level + 1][0], level + 1, 0, node, -negative))
    kept = None if classes is None else np.array([classes[place] for place in places], np.int64)
    arrays = np.array(tokens, np.int64), np.array(parents, np.int64), np.array(totals, np.float32)
    return DraftTree(*arrays, classes=kept)


def tree_from_branches(
    branches: Sequence[tuple[Sequence[int], Sequence[int]]],  # (token ids, their classes) of each, from the root down
    log_rates: NDArray[np.float64],  # [classes]
) -> DraftTree:
    """Branches merged where they begin alike. A node's probability is its class's rate times its parent's probability."""
    tokens: list[int] = []
    parents: list[int] = []
    log_probs: list[float] = []
    classes: list[int] = []
    known: dict[tuple[int, int], int] = {}
    for token_ids, kinds in branches:
        parent = ROOT
        for token, kind in zip(token_ids, kinds, strict=True):
            node = known.setdefault((parent, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(parent)
                log_probs.append(float(log_rates[kind]) + (0.0 if parent == ROOT else log_probs[parent]))
                classes.append(kind)
            parent = node
    arrays = np.array(tokens, np.int64), np.array(parents, np.int64), np.array(log_probs, np.float32)
    return DraftTree(*arrays, classes=np.array(classes, np.int64))

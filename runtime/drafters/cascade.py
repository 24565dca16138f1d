"""Two drafters, the cheaper first: the second is asked where the first promises too little.

A copy out of the text costs next to nothing and is right either often or hardly ever; a head costs a graph and is right
about as often everywhere. So the head is asked only where the copy is unsure of itself.
"""

from collections.abc import Sequence

import numpy as np

from headstart.runtime.tree import DraftTree

from .base import Drafter, DraftRequest, DraftSequence, Features, Target


class Cascade:
    """Two drafters used as one.

    `enough` is the number of tokens the first drafter's tree must promise, 1 + Σ path probability of its nodes, for the
    second not to be asked. Tuning sets it to what the second brings on average.

    The choice depends on the first tree alone, and must: a choice by what the second has *drawn* would favour some
    draws over others, and the output would follow another distribution than the target's. For the same reason a first
    drafter that draws its tokens is only overruled by its own absence of a draft.
    """

    default_nodes = 12

    def __init__(self, first: Drafter, second: Drafter, enough: float) -> None:
        self.name = f"{first.name}+{second.name}"
        self._first, self._second = first, second
        self._enough = enough
        self.reads = first.reads | second.reads
        self.class_count = first.class_count + second.class_count

    def prior_rates(self) -> list[float]:
        return [*self._first.prior_rates(), *self._second.prior_rates()]

    def use_rates(self, rates: Sequence[float]) -> None:
        self._first.use_rates(rates[: self._first.class_count])
        self._second.use_rates(rates[self._first.class_count :])

    def open(self, sequence: DraftSequence, target: Target) -> None:
        self._first.open(sequence, target)
        self._second.open(sequence, target)

    def observe(self, sequence: DraftSequence, rows: Features, path: Sequence[int]) -> None:
        self._first.observe(sequence, rows, path)
        self._second.observe(sequence, rows, path)

    def price(self, nodes: int, depth: int) -> float:
        return self._first.price(nodes, depth) + self._second.price(nodes, depth)

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        trees = self._first.propose(requests)
        unsure = [i for i, tree in enumerate(trees) if self._is_unsure(tree)]
        if unsure:
            for i, tree in zip(unsure, self._second.propose([requests[i] for i in unsure]), strict=True):
                if len(tree):  # nothing to propose is a fact of the text, not of what was drawn
                    trees[i] = tree
        return trees

    def _is_unsure(self, tree: DraftTree) -> bool:
        return len(tree) == 0 or (tree.draft_probs is None and promised(tree) < self._enough)

    def close(self, sequence: DraftSequence) -> None:
        self._first.close(sequence)
        self._second.close(sequence)


def promised(tree: DraftTree) -> float:
    """Expected tokens of verifying the whole tree: one of the target's own, and each node with its path's probability."""
    return 1.0 + float(np.exp(tree.log_probs).sum())

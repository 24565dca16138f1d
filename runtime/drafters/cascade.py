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

    Which tree is used must not depend on tokens that were drawn: an acceptance rule corrects for the distribution that a
    token was drawn from, not for a draft kept because of what it happened to be. So a drawn tree, once there is one, is the
    draft.
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
        unsure = [i for i, tree in enumerate(trees) if not _drawn(tree) and promised(tree) < self._enough]
        if unsure:
            for i, tree in zip(unsure, self._second.propose([requests[i] for i in unsure]), strict=True):
                if _drawn(tree) or promised(tree) > promised(trees[i]):
                    trees[i] = tree
        return trees

    def taken_back(self, sequence: DraftSequence, known: int) -> None:
        self._first.taken_back(sequence, known)
        self._second.taken_back(sequence, known)

    def close(self, sequence: DraftSequence) -> None:
        self._first.close(sequence)
        self._second.close(sequence)


def _drawn(tree: DraftTree) -> bool:
    return tree.draft_probs is not None


def promised(tree: DraftTree) -> float:
    """Expected tokens of verifying the whole tree: one of the target's own, and each node with its path's probability."""
    return 1.0 + float(np.exp(tree.log_probs).sum())

"""Two drafters, the cheaper first: where its draft promises enough, the other is not asked.

A copy out of the text costs next to nothing, and is right either often or hardly ever; a head costs a graph and is right
about as often everywhere. So the head is asked only where the copy is unsure of itself.

Which tree is used must not depend on tokens that were drawn: an acceptance rule corrects for the distribution a token was
drawn from, not for a draft kept because of what it happened to be. So a drawn tree, once there is one, is the draft.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.cache import CrossState
from headstart.runtime.tree import DraftTree

from .base import DraftRequest, SourceReader, TunedDrafter


class Cascade:
    """Family F followed by A (or any other).

    `enough` is the number of tokens the first drafter's tree must promise, 1 + Σ path probability over its best nodes, for
    the second not to be asked. Tuning sets it to what the second brings on average.
    """

    default_nodes = 12

    def __init__(self, first: TunedDrafter, second: TunedDrafter, enough: float) -> None:
        self.name = f"{first.name}+{second.name}"
        self._first, self._second = first, second
        self._enough = enough
        self.reads_hidden = first.reads_hidden or second.reads_hidden
        self.class_count = first.class_count + second.class_count

    def prior_rates(self) -> list[float]:
        return [*self._first.prior_rates(), *self._second.prior_rates()]

    def use_rates(self, rates: Sequence[float]) -> None:
        self._first.use_rates(rates[: self._first.class_count])
        self._second.use_rates(rates[self._first.class_count :])

    def open(self, batch: int) -> None:
        self._first.open(batch)
        self._second.open(batch)

    def read(self, sources: Sequence[NDArray[Any]], cross: CrossState | None) -> None:
        for drafter in (self._first, self._second):
            if isinstance(drafter, SourceReader):
                drafter.read(sources, cross)

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        trees = self._first.propose(requests)
        unsure = [i for i, tree in enumerate(trees) if not _drawn(tree) and promised(tree) < self._enough]
        if unsure:
            for i, tree in zip(unsure, self._second.propose([requests[i] for i in unsure]), strict=True):
                if _drawn(tree) or promised(tree) > promised(trees[i]):
                    trees[i] = tree
        return trees


def _drawn(tree: DraftTree) -> bool:
    return tree.draft_probs is not None


def promised(tree: DraftTree) -> float:
    """Expected tokens of verifying the whole tree: one of the target's own, and each node with its path's probability."""
    return 1.0 + float(np.exp(tree.log_probs).sum())

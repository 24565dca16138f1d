"""What drafters that copy from an index of known text share (family F: no graph): one index a sequence, one table of rates."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.tree import DraftTree

from .base import DraftRequest, DraftSequence, Features, PriceMeter, Target

Index = TypeVar("Index")


class TextIndexDrafter(ABC, Generic[Index]):
    """A drafter that keeps an `Index` for each sequence and reads nothing of the target."""

    name: str
    default_nodes: int
    class_count: int
    reads: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._indexes: dict[int, Index] = {}
        self._meter = PriceMeter()
        self.use_rates(self.prior_rates())

    @abstractmethod
    def prior_rates(self) -> list[float]: ...

    @abstractmethod
    def new_index(self, sequence: DraftSequence) -> Index:
        """The index of a sequence that starts."""

    @abstractmethod
    def draft(self, index: Index, request: DraftRequest) -> DraftTree:
        """Bring the index up to date with the text, and propose."""

    def taken_back(self, sequence: DraftSequence, known: int) -> None:
        """All but the first `known` tokens were provisional, and are others now."""
        self._indexes[sequence.id] = self.new_index(sequence)

    def use_rates(self, rates: Sequence[float]) -> None:
        self._log_rates: NDArray[np.float64] = np.log(np.clip(np.array(rates), 1e-4, 1.0))

    def open(self, sequence: DraftSequence, target: Target) -> None:
        self._indexes[sequence.id] = self.new_index(sequence)

    def observe(self, sequence: DraftSequence, rows: Features, path: Sequence[int]) -> None:
        """No-op: an index catches up with the text when a draft is wanted."""

    def price(self, nodes: int, depth: int) -> float:
        return self._meter.milliseconds

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        with self._meter.measure(len(requests)):
            return [self.draft(self._indexes[request.sequence.id], request) for request in requests]

    def close(self, sequence: DraftSequence) -> None:
        self._indexes.pop(sequence.id, None)

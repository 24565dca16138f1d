"""What heads have in common that draft from one hidden state of the target: that of the row which decided the root."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.graph import Graph

from .base import DraftRequest, DraftSequence, Features, PriceMeter, Target
from .confidence import Confidence


class StateHead:
    """A drafter but for `propose`; keeps nothing from one draft to the next but each sequence's last state."""

    default_nodes = 12
    reads = frozenset({contract.HIDDEN})

    def __init__(self, name: str, graph: Graph, depths: int) -> None:
        self.name = name
        self._graph = graph
        self._hidden: dict[int, NDArray[np.float32]] = {}  # of each sequence, [1, H]
        self._meter = PriceMeter()
        self._confidence = Confidence(depths)
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

    def taken_back(self, sequence: DraftSequence, known: int) -> None:
        """No-op: the row that decided the root comes next."""

    def close(self, sequence: DraftSequence) -> None:
        self._hidden.pop(sequence.id, None)

    def _states(self, requests: Sequence[DraftRequest]) -> NDArray[np.float32]:
        """[B, 1, H]"""
        return np.stack([self._hidden[request.sequence.id] for request in requests])

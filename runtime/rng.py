"""The only source of randomness in decoding, so that a test can enumerate every outcome."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Rng(Protocol):
    """What acceptance asks of a random number generator."""

    def accept(self, probability: float) -> bool:
        """True with this probability."""
        ...

    def choose(self, probabilities: NDArray[np.float64]) -> int:
        """An index drawn from the distribution [V] float64."""
        ...


class NumpyRng:
    """numpy's generator; equal seeds give equal decisions, None differs each time."""

    def __init__(self, seed: np.random.SeedSequence | int | None = None) -> None:
        self._generator = np.random.default_rng(seed)

    def accept(self, probability: float) -> bool:
        return bool(self._generator.random() < probability)

    def choose(self, probabilities: NDArray[np.float64]) -> int:
        cumulative = np.cumsum(probabilities)
        # Scaled by the sum, so that rounding cannot push the draw beyond the last token.
        return int(np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right"))

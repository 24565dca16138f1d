"""Classes of drafted nodes by depth and by how sure the head itself is, and what acceptance they turn out to have."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BAND = 0.35  # nats of a head's own log-probability
BANDS = 12  # the last is open
LEAST = 1e-4  # a rate: its logarithm must be finite


class Confidence:
    """A head's log-probabilities, corrected by the measured acceptance of nodes of that depth and confidence."""

    def __init__(self, depths: int) -> None:
        self.class_count = depths * BANDS
        self._log_rates: NDArray[np.float32] | None = None

    def prior_rates(self) -> list[float]:
        """What the head itself claims: the middle of each band."""
        return [float(np.exp(-BAND * (band + 0.5))) for _ in range(self.class_count // BANDS) for band in range(BANDS)]

    def use_rates(self, rates: Sequence[float]) -> None:
        table = np.array(rates, np.float32).reshape(-1, BANDS)
        # More confidence never means less acceptance: what says otherwise is noise of a rare band.
        falling = np.maximum.accumulate(table[:, ::-1], axis=1)[:, ::-1]
        self._log_rates = np.log(np.maximum(falling, LEAST)).reshape(-1)

    def classes(self, log_probs: NDArray[np.float32], depths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of nodes with these log-probabilities given their parents, at these depths; the first depth is 0."""
        # A head that computes NaN is not to be believed.
        bands: NDArray[np.int64] = np.nan_to_num(-log_probs / BAND, nan=BANDS, posinf=BANDS).astype(np.int64)
        return np.minimum(bands, BANDS - 1) + BANDS * depths

    def corrected(self, log_probs: NDArray[np.float32], classes: NDArray[np.int64]) -> NDArray[np.float32]:
        """The head's own until rates are measured."""
        return log_probs if self._log_rates is None else self._log_rates[classes]

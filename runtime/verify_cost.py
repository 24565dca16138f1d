"""What a verify pass costs: t(B, n), measured by `headstart tune`, or learned while decoding where nothing was tuned.

t(B, n) are milliseconds of one pass of the target over n rows (the root included) for each of B sequences.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .graph import MAX_ROWS

Curve = NDArray[np.float64]  # [MAX_ROWS + 1]: milliseconds of that many rows; index 0 is not used

# Relative to one row, a pass over n rows is assumed to cost 1 + SLOPE (n - 1) before it was seen. Measured: 0.075 for int8 and
# 0.03 for float32 on CPUs with VNNI, 0.3 for 4-bit weights; high enough to be careful, and corrected by the first pass.
SLOPE = 0.15
WEIGHT = 0.25  # of the newest pass in a running mean


class CostModel(Protocol):
    """Knows t(B, n)."""

    def curve(self, batch: int, history: int) -> Curve:
        """The cost of each number of rows for `batch` sequences whose states hold `history` tokens on average."""
        ...

    def observe(self, batch: int, rows: int, milliseconds: float) -> None:
        """One pass took that long."""
        ...


@dataclass(frozen=True)
class BatchCost:
    """t(B, n) of one B: `milliseconds[h][r]` of a pass over `rows[r]` rows for each sequence, after `histories[h]` tokens."""

    batch: int
    rows: tuple[int, ...]
    histories: tuple[int, ...]
    milliseconds: tuple[tuple[float, ...], ...]

    def with_nodes(self, node_ms: float) -> "BatchCost":
        more = node_ms * self.batch * (np.array(self.rows) - 1)
        return dataclasses.replace(self, milliseconds=tuple(tuple(map(float, line + more)) for line in self.milliseconds))

    def curve(self, history: int) -> Curve:
        """Linear between the measured histories and rows, flat beyond the measured histories."""
        table = np.array(self.milliseconds)  # [histories, rows]
        at_history = [np.interp(history, self.histories, column) for column in table.T]
        curve = np.interp(np.arange(MAX_ROWS + 1), self.rows, at_history)
        slope = (at_history[-1] - at_history[0]) / (self.rows[-1] - self.rows[0])
        beyond = np.arange(self.rows[-1] + 1, MAX_ROWS + 1)
        curve[beyond] = at_history[-1] + slope * (beyond - self.rows[-1])
        return np.asarray(curve, np.float64)


@dataclass(frozen=True)
class VerifyCost:
    """t(B, n) as tuning measured it, for rising B."""

    batches: tuple[BatchCost, ...]

    @property
    def single(self) -> BatchCost:
        """Of one sequence."""
        return self.batches[0]

    def with_nodes(self, node_ms: float) -> "VerifyCost":
        """The same where each drafted row costs so much more than its part of the pass: masks, acceptance, commits."""
        return VerifyCost(tuple(cost.with_nodes(node_ms) for cost in self.batches))

    def curve(self, batch: int, history: int) -> Curve:
        """Linear between the measured batches; beyond the largest the last two continue: more sequences always cost more."""
        sizes = [cost.batch for cost in self.batches]
        if len(sizes) == 1:
            return self.single.curve(history) * batch / sizes[0]
        right = int(np.clip(np.searchsorted(sizes, batch), 1, len(sizes) - 1))
        low, high = (self.batches[i].curve(history) for i in (right - 1, right))
        share = (batch - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        return np.asarray(low + max(0.0, share) * (high - low), np.float64)

    def observe(self, batch: int, rows: int, milliseconds: float) -> None:
        """No-op: it was measured under better conditions than a single pass."""


@dataclass
class RunningCost:
    """t(B, n) as the passes of this process took, by running means; a careful assumption where none was seen."""

    _means: dict[tuple[int, int], float] = field(default_factory=dict)  # (batch, rows) -> milliseconds
    _counts: dict[tuple[int, int], int] = field(default_factory=dict)
    _curves: dict[int, Curve] = field(default_factory=dict)

    def observe(self, batch: int, rows: int, milliseconds: float) -> None:
        key = batch, rows
        count, mean = self._counts.get(key, 0), self._means.get(key, milliseconds)
        # The first pass of a shape also pays for its buffers, so of the first two the faster counts.
        self._means[key] = min(mean, milliseconds) if count < 2 else mean + WEIGHT * (milliseconds - mean)
        self._counts[key] = count + 1
        self._curves.pop(batch, None)

    def curve(self, batch: int, history: int) -> Curve:
        if batch not in self._curves:
            self._curves[batch] = self._fitted(batch)
        return self._curves[batch]

    def _fitted(self, batch: int) -> Curve:
        """Through the running means of that batch, never falling, with the assumed slope beyond them."""
        seen = sorted((rows, mean) for (size, rows), mean in self._means.items() if size == batch)
        if not seen:
            return np.asarray(1 + SLOPE * (np.arange(MAX_ROWS + 1) - 1), np.float64)
        rows, means = np.array([r for r, _ in seen]), np.maximum.accumulate([m for _, m in seen])
        curve = np.interp(np.arange(MAX_ROWS + 1), rows, means)
        slope = SLOPE * means[0] / (1 + SLOPE * (rows[0] - 1))
        beyond = np.arange(rows[-1] + 1, MAX_ROWS + 1)
        curve[beyond] = means[-1] + slope * (beyond - rows[-1])
        below = np.arange(0, rows[0])
        curve[below] = means[0] - slope * (rows[0] - below)
        return np.asarray(curve, np.float64)

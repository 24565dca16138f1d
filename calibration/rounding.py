"""Weights rounded to a few bits: schemes, and the nearest value of each weight.

Always symmetric: without zero points integer products need no correction, and every runtime reads them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.errors import OptionError

GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True)
class WeightScheme:
    """How a [K, N] weight is stored.

    Attributes:
        bits: 8 or 4.
        group: rows of one column that share a scale; 0 means one scale per column (output channel).
    """

    bits: int
    group: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise OptionError(f"weights of {self.bits} bits are unknown. Choose int8 or int4.")
        if self.group and self.group not in GROUPS:
            raise OptionError(f"--group {self.group} is unknown. Choose one of: {', '.join(map(str, GROUPS))}.")
        if self.bits == 8 and self.group:
            raise OptionError("int8 weights have one scale per output channel and take no --group. Fix: leave it out.")

    @property
    def largest(self) -> int:
        return 127 if self.bits == 8 else 7

    def fitting(self, inputs: int) -> "WeightScheme":
        """For a weight of that many input rows: the same, the next smaller group that divides them, or 8 bits."""
        if not self.group or inputs % self.group == 0:
            return self
        smaller = [group for group in GROUPS if group < self.group and inputs % group == 0]
        return WeightScheme(4, max(smaller)) if smaller else WeightScheme(8)


INT8 = WeightScheme(8)


@dataclass(frozen=True)
class QuantizedWeight:
    """values [K, N] int8 within ± largest, scales [N] (per channel) or [K / group, N] float32."""

    values: NDArray[np.int8]
    scales: NDArray[np.float32]

    def dequantized(self) -> NDArray[np.float32]:
        """[K, N] float32."""
        return np.multiply(self.values, spread(self.scales, len(self.values)), dtype=np.float32)


def round_to_nearest(weight: NDArray[np.float32], scheme: WeightScheme) -> QuantizedWeight:
    """[K, N] float32, each value to the nearest multiple of its scale; the largest of a group is exact."""
    scales = scales_of(weight, scheme)
    rows = spread(scales, len(weight))
    return QuantizedWeight(np.clip(np.rint(weight / rows), -scheme.largest, scheme.largest).astype(np.int8), scales)


def scales_of(weight: NDArray[np.float32], scheme: WeightScheme) -> NDArray[np.float32]:
    """[N] or [K / group, N]: maps the largest magnitude of each group to the largest integer; 1 if all are zero."""
    if scheme.group:
        grouped = np.abs(weight).reshape(-1, scheme.group, weight.shape[1]).max(axis=1)
    else:
        grouped = np.abs(weight).max(axis=0)
    return np.where(grouped > 0, grouped / scheme.largest, 1).astype(np.float32)


def spread(scales: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """One scale per weight, broadcastable against [K, N]."""
    return scales if scales.ndim == 1 else np.repeat(scales, rows // len(scales), axis=0)

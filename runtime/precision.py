"""How far logits may lie from a reference in each precision: the one table that `build` and `verify` both read.

The bounds are declared here and never taken from the engine under test. They are fractions of a row's logit range (its largest
logit minus its smallest), so that they hold for any scale of logits.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import EngineError


@dataclass(frozen=True)
class Limits:
    """What a graph in one precision may differ by from the same graph as exported (the canonical graph).

    Attributes:
        largest: the largest |Δlogit| over its row's logit range, of all rows.
        median: the median over rows of each row's largest |Δlogit| over its logit range.
        tie: the largest gap, over the logit range, between two tokens of which the reference holds one for the best and a graph
            in this precision may choose the other.
        why: which rounding the bound allows for.
    """

    largest: float
    median: float
    tie: float
    why: str

    def widened(self, rounding: "Difference") -> "Limits":
        """ROUNDINGS times what rounding by itself does, where that is more."""
        largest, median = (ROUNDINGS * value for value in (rounding.largest, rounding.median))
        return dataclasses.replace(
            self, largest=max(self.largest, largest), median=max(self.median, median), tie=max(self.tie, median)
        )


ROUNDINGS = 3  # times what rounding activations does by itself: what an integer graph may differ by
INTEGERS = ("int8_per_row", "int4")  # rows of LIMITS with rounded activations
LIMITS = {
    "float32": Limits(3e-4, 5e-5, 5e-5, "only the order of summation differs"),
    "float16": Limits(2e-2, 5e-3, 1e-2, "11 bits of mantissa in weights, activations and caches"),
    "bfloat16": Limits(8e-2, 2e-2, 4e-2, "8 bits of mantissa in weights, activations and caches"),
    "int8_per_row": Limits(0.3, 0.04, 0.06, "int8 weights per output channel, activations rounded to 8 bits per row"),
    "int4": Limits(0.3, 0.04, 0.06, "int4 weights widened to int8 per output channel, activations rounded to 8 bits per row"),
}


@dataclass(frozen=True)
class Difference:
    """Of logits from a reference, each row's largest |Δlogit| over its logit range: the largest row, and the median row."""

    largest: float
    median: float

    def within(self, limits: Limits) -> bool:
        """False for NaN: comparisons with NaN are false, so NaN is within no limit."""
        return self.largest <= limits.largest and self.median <= limits.median


# Share of the float model's greedy tokens below which quantized weights are reported not to represent the model.
LEAST_AGREEMENT = 0.7


@dataclass(frozen=True)
class FloatAgreement:
    """A quantized model against the float model it came from, on the golden texts.

    Attributes:
        greedy: share of the float model's greedy tokens that the quantized one picks after the same text.
        largest, median: of each row's largest |Δlogit| over its logit range, among the float model's 64 best tokens.
    """

    greedy: float
    largest: float
    median: float


def precision_of(dtype: str, integer_products: bool, weights: str = "") -> str:
    """The row of LIMITS for an engine.

    Args:
        dtype: of activations: float32, float16 or bfloat16.
        integer_products: quantized layers multiply integers, with activations rounded per row.
        weights: the bundle's quantization, as the manifest says it: "int8", "int4", "" for none.
    """
    if not integer_products:
        return dtype
    return "int4" if weights.startswith("int4") else "int8_per_row"


def difference(graph: str, ours: NDArray[np.float32], reference: NDArray[np.float32]) -> Difference:
    """Compare [..., V] logits with a reference of the same shape.

    Raises EngineError, naming `graph`, for NaN or infinity on either side: comparing with those can never fail.
    """
    check_finite(f"The {graph} under test", ours)
    check_finite(f"The reference of {graph}", reference)
    rows = np.abs(ours - reference).max(axis=-1) / np.maximum(np.ptp(reference, axis=-1), np.finfo(np.float32).tiny)
    return Difference(float(rows.max()), float(np.median(rows)))


def check_finite(what: str, values: NDArray[np.float32]) -> None:
    """Raises EngineError that begins with `what` unless every value is finite."""
    wrong = int(values.size - np.isfinite(values).sum())
    if wrong:
        raise EngineError(
            f"{what} computes NaN or infinity: {wrong} of {values.size} values. The rule: every output is finite. "
            "Fix: check the checkpoint's weights, or choose a wider precision (bfloat16 or float32)."
        )

"""float16 and bfloat16 in numpy, which knows the former only: bfloat16 is the upper half of a float32."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

STORED: dict[str, Any] = {"float16": np.float16, "bfloat16": np.uint16}  # what arrays of that precision are kept as


def widened(stored: NDArray[Any], precision: str) -> NDArray[np.float32]:
    """float32 of what a device computed."""
    if precision == "float16":
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: NDArray[np.float32], precision: str) -> NDArray[Any]:
    """What a device takes; bfloat16 rounds to the nearest, ties to even."""
    if precision == "float16":
        return values.astype(np.float16)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

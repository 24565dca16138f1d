"""Some rows of a target's LM head, read from its bundle without reading the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import WeightInfo
from .hadamard import rotated_rows


@dataclass(frozen=True)
class LmHeadRows:
    """Rows as the bundle stores them.

    Attributes:
        values: [rows, H] float32, or int8 with `scales` [rows].
        rotation: the block of the rotation that the states they are multiplied with go through; 0 for none.
    """

    values: NDArray[Any]
    scales: NDArray[np.float32] | None
    rotation: int

    def floats(self) -> NDArray[np.float32]:
        """[rows, H] to be multiplied with hidden states as they are."""
        values = self.values.astype(np.float32)
        if self.scales is not None:
            values *= self.scales[:, None]
        return rotated_rows(values, self.rotation) if self.rotation else values


def lm_head_rows(bundle: Path, weights: Mapping[str, WeightInfo], hidden: int, rows: NDArray[np.int64]) -> LmHeadRows:
    """The rows of those tokens, whichever way round the matrix is stored."""
    info, scale = weights["lm_head"], weights.get("lm_head.scale")
    matrix = mapped(bundle, info)
    values = np.ascontiguousarray(matrix[rows] if info.shape[1] == hidden else matrix[:, rows].T)
    scales = None if scale is None else mapped(bundle, scale)[rows].astype(np.float32)
    return LmHeadRows(values if scale is not None else values.astype(np.float32), scales, info.rotation)


def mapped(bundle: Path, info: WeightInfo) -> NDArray[Any]:
    """A tensor of a bundle's data file, in the file's memory."""
    return np.memmap(bundle / info.file, info.dtype, "r", info.offset, info.shape)

"""Some rows of a target's tables of one row a token, its LM head and its embeddings, read without reading the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import WeightInfo
from .hadamard import rotated_rows

LM_HEAD, EMBEDDINGS = "lm_head", "embeddings"


@dataclass(frozen=True)
class TokenRows:
    """Rows as the bundle stores them.

    Attributes:
        values: [rows, H] float32, or int8 with `scales` [rows].
        rotation: the block of the rotation that undoes theirs; 0 for none. What is multiplied with rows of an LM head goes
            through it, and what is looked up in a table of embeddings.
    """

    values: NDArray[Any]
    scales: NDArray[np.float32] | None
    rotation: int

    def floats(self) -> NDArray[np.float32]:
        """[rows, H] as the checkpoint has them, but for rounding."""
        values = self.values.astype(np.float32)
        if self.scales is not None:
            values *= self.scales[:, None]
        return rotated_rows(values, self.rotation) if self.rotation else values


class TokenTable:
    """One of the tables in a bundle's files, whichever way round it is stored."""

    def __init__(self, bundle: Path, weights: Mapping[str, WeightInfo], table: str, hidden: int) -> None:
        """`weights`: where `table`, and "`table`.scale" of a quantized one, lie; `hidden`: the width of a row."""
        scale = weights.get(f"{table}.scale")
        self._info, self._hidden = weights[table], hidden
        self._matrix = mapped(bundle, self._info)
        self._scales = None if scale is None else mapped(bundle, scale)

    def rows(self, tokens: NDArray[np.int64]) -> TokenRows:
        by_rows = self._info.shape[1] == self._hidden
        values = np.ascontiguousarray(self._matrix[tokens] if by_rows else self._matrix[:, tokens].T)
        scales = None if self._scales is None else self._scales[tokens].astype(np.float32)
        return TokenRows(values if scales is not None else values.astype(np.float32), scales, self._info.rotation)


def mapped(bundle: Path, info: WeightInfo) -> NDArray[Any]:
    """A tensor of a bundle's data file, in the file's memory."""
    return np.memmap(bundle / info.file, info.dtype, "r", info.offset, info.shape)

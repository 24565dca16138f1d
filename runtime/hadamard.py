"""Block-Hadamard rotations of rows, in numpy (see `exporter.passes.rotation` for what they are for)."""

import numpy as np
from numpy.typing import NDArray


def hadamard(size: int) -> NDArray[np.float32]:
    """[size, size] orthogonal and symmetric; `size` is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    orthogonal: NDArray[np.float32] = (matrix / np.sqrt(size)).astype(np.float32)
    return orthogonal


def rotated_rows(matrix: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """[..., K] whose rows are rotated: its own inverse."""
    blocks = np.ascontiguousarray(matrix).reshape(-1, block)
    rows: NDArray[np.float32] = (blocks @ hadamard(block)).reshape(matrix.shape)
    return rows

"""The part of the target's vocabulary that a head drafts, where that is not all of it."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.errors import HeadError


def token_map_of(stored: NDArray[Any], vocab_size: int, folder: Path) -> NDArray[np.int64]:
    """[V'] the target's ids of the drafted tokens, of a tensor that a checkpoint names token_map. Raises HeadError."""
    token_map = stored.astype(np.int64)  # exact: float32 holds every integer below 2 ** 24
    if token_map.ndim != 1 or len(np.unique(token_map)) != token_map.size or not _within(token_map, vocab_size):
        raise HeadError(f"{folder}: token_map must list different tokens below {vocab_size}, the target's vocabulary.")
    return token_map


def _within(token_map: NDArray[np.int64], vocab_size: int) -> bool:
    return bool(token_map.size and token_map.min() >= 0 and token_map.max() < vocab_size)

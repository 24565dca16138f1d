"""Running known tokens through an engine: the prompt, or whatever a draft model has not seen yet."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import KVCache
from .engine import Engine, StepOutput

CHUNK = 256  # rows per forward; larger ones cost memory (rows x slots of attention) and save little


def open_cache(engine: Engine, slots: int, source: NDArray[Any] | None = None) -> KVCache:
    """An empty cache for one sequence, and its source encoded when the model has an encoder."""
    return engine.new_cache(1, slots, None if source is None else engine.encode([source]))


def prefill(engine: Engine, cache: KVCache, token_ids: Sequence[int]) -> StepOutput:
    """Write and commit `token_ids` behind the cache of one sequence, in chunks.

    Returns the last chunk's output: logits [1, 1, V] of the last token, hidden [1, T, H].
    """
    assert cache.batch == 1 and len(token_ids) > 0
    for begin in range(0, len(token_ids), CHUNK):
        chunk = token_ids[begin : begin + CHUNK]
        count, start = len(chunk), int(cache.lengths[0])
        output = engine.forward(
            cache,
            np.array(chunk, np.int64)[None],
            np.arange(start, start + count, dtype=np.int64)[None],
            np.tri(count, dtype=np.bool_)[None],
            np.array([[count - 1]], np.int64),
        )
        cache.commit(0, range(count))
    return output

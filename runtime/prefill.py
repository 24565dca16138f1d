"""Running known tokens through an engine: the prompt, or whatever a draft model has not seen yet."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import KVCache
from .engine import Engine, StepOutput
from .errors import PromptError

CHUNK = 256  # rows per forward; larger ones cost memory (rows x slots of attention) and save little


def check_prompts(prompts: Sequence[Sequence[int]], limit: int) -> None:
    """Raises PromptError when one is empty or leaves no room for a new token among `limit`."""
    longest = max(map(len, prompts), default=0)
    if longest == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise PromptError("The prompt is empty: decoding needs at least one token to start from.")
    if longest >= limit:
        raise PromptError(
            f"The prompt has {longest} tokens, and this bundle's cache holds {limit} with room for no new one. "
            f"Fix: at most {limit - 1} tokens, or export again with a larger --max-cache."
        )


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

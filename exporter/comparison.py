"""Comparing an engine with what the checkpoint computes: logits of a text, greedy tokens.

Shared by the end of `export`, `quantize` and `verify`. Knows engines and arrays; knows nothing of torch.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.engine import Engine
from headstart.runtime.prefill import open_cache, prefill


def all_logits(engine: Engine, token_ids: NDArray[np.int64], source: NDArray[Any] | None = None) -> NDArray[np.float32]:
    """[T, V] logits of every row of one text, in one forward."""
    count = len(token_ids)
    cache = open_cache(engine, count, source)
    rows = np.arange(count)[None]
    output = engine.forward(cache, token_ids[None], rows, np.tri(count, dtype=np.bool_)[None], rows)
    return np.array(output.logits[0])


def greedy_tokens(engine: Engine, prompt: list[int], count: int, source: NDArray[Any] | None = None) -> NDArray[np.int64]:
    """[count] tokens of plain greedy decoding, one row at a time, without end tokens or logit rules."""
    cache = open_cache(engine, len(prompt) + count, source)
    tokens = [int(prefill(engine, cache, prompt).logits[0, 0].argmax())]
    while len(tokens) < count:
        tokens.append(int(prefill(engine, cache, tokens[-1:]).logits[0, 0].argmax()))
    return np.array(tokens, np.int64)


def compare_greedy(engine: Engine, prompt: list[int], wanted: list[int], source: NDArray[Any] | None = None) -> float | None:
    """None when the engine's greedy tokens equal `wanted`, else the relative top-2 margin where they first differ."""
    cache = open_cache(engine, len(prompt) + len(wanted), source)
    logits = prefill(engine, cache, prompt).logits[0, 0]
    for token in wanted:
        if int(logits.argmax()) != token:
            return top_two_margin(logits) / float(logits.max() - logits.min())
        logits = prefill(engine, cache, [token]).logits[0, 0]
    return None


def top_two_margin(logits: NDArray[np.float32]) -> float:
    """Between the two highest of [V] logits."""
    best = np.partition(logits, -2)[-2:]
    return float(best[1] - best[0])

"""Does a decoder fit the graph contract? Asked in torch, in seconds, before it is traced, which takes minutes.

1. It is a decoder: what comes later changes nothing earlier.
2. Run as its graph will be (rows in slots, positions and masks as inputs, a tree with two branches), it computes what its own
   forward does. A model that counts positions or masks on its own, in a way that `architectures` does not know, fails here.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headstart.runtime.bundle import KeyValueInfo
from headstart.runtime.errors import CheckpointError
from headstart.runtime.precision import LIMITS

from .golden import golden_inputs, reference_logits, without_padding
from .rope import Variants
from .tracing import DecoderGraph, on_the_contract

HISTORY = 6  # tokens before the tree
# Rows after the history: a root, its two children, and a child of the first. (parent row, depth)
TREE = ((None, 0), (0, 1), (0, 1), (1, 2))


def check_decoder(model: Any, caches: tuple[KeyValueInfo, ...], variants: Variants) -> None:
    """Raises CheckpointError for a model that does not fit."""
    ids = golden_inputs(model.config.get_text_config().vocab_size, 2 * (HISTORY + len(TREE)), seed=3)[:1]
    without_padding(model, ids)
    _check_causal(model, ids)
    _check_steps(model, caches, variants, ids)


def _check_causal(model: Any, ids: NDArray[np.int64]) -> None:
    other = ids.copy()
    other[:, -1] = ids[:, 0]
    logits = reference_logits(model, ids)[0, :-1]
    if not np.isfinite(logits).all():
        raise CheckpointError(
            f"{type(model).__name__}: the checkpoint itself computes NaN or infinity, in {_dtype(model)}. Fix: check its "
            "weights, or choose a wider --dtype (bfloat16 or float32)."
        )
    changed = _largest(reference_logits(model, other)[0, :-1], logits)
    if changed > LIMITS[_dtype(model)].largest:
        stated = "" if getattr(model.config, "is_decoder", True) else ' ("is_decoder" is false in config.json)'
        raise CheckpointError(
            f"{type(model).__name__} is no decoder{stated}: its output at a token changes with the tokens after it, by "
            f"{changed:.1e} of the logits' range. Fix: a checkpoint that was trained to generate from left to right."
        )


def _check_steps(model: Any, caches: tuple[KeyValueInfo, ...], variants: Variants, ids: NDArray[np.int64]) -> None:
    ours, wanted = _tree_logits(model, caches, variants, ids), _path_logits(model, ids)
    difference = _largest(ours, wanted)
    if not difference <= LIMITS[_dtype(model)].largest:
        raise CheckpointError(
            f"{type(model).__name__} is not supported: run step by step, with positions and masks as inputs, its logits differ "
            f"from its own forward's by {difference:.1e} of their range. It counts positions or masks rows on its own, in "
            "a way that is not known. Nearest supported: a decoder such as Llama, Qwen3, GPT-2 or OPT."
        )


def _tree_logits(
    model: Any, caches: tuple[KeyValueInfo, ...], variants: Variants, ids: NDArray[np.int64]
) -> NDArray[np.float32]:
    """[rows of TREE, V] through the slots, in two steps."""
    graph, tokens = DecoderGraph(model, (), variants).eval(), torch.from_numpy(ids)
    slots = HISTORY + len(TREE)
    buffers = [
        torch.zeros(1, cache.kv_heads, slots, size, dtype=model.dtype)
        for cache in caches
        for size in (cache.key_size, cache.value_size)
    ]
    history = torch.arange(HISTORY)[None]
    mask = torch.zeros(1, 1, HISTORY, slots, dtype=torch.bool)
    mask[0, 0, :, :HISTORY] = torch.ones(HISTORY, HISTORY).tril().bool()
    depths = torch.tensor([[HISTORY + depth for _, depth in TREE]])
    chosen = torch.arange(len(TREE))[None]
    try:
        with on_the_contract(model, variants), torch.no_grad():
            out = graph(tokens[:, :HISTORY], history, mask, torch.zeros(1, dtype=torch.long), history, buffers)
            written = list(out[-len(buffers) :])
            start = torch.full((1,), HISTORY)
            out = graph(tokens[:, HISTORY:], depths, _tree_mask(slots), start, chosen, written)
    except CheckpointError:
        raise
    except Exception as error:  # an architecture's code may fail in any way on positions or masks it does not expect
        raise CheckpointError(
            f"{type(model).__name__} is not supported: it cannot run with positions and masks as inputs ({error}). "
            "Nearest supported: a decoder with plain attention layers, such as Llama or Qwen3."
        ) from error
    return np.asarray(out[0][0].float().numpy())


def _tree_mask(slots: int) -> torch.Tensor:
    """[1, 1, rows, slots]: the history, the row's ancestors, and itself."""
    mask = torch.zeros(len(TREE), slots, dtype=torch.bool)
    mask[:, :HISTORY] = True
    for row in range(len(TREE)):
        mask[row, [HISTORY + ancestor for ancestor in _path(row)]] = True
    return mask[None, None]


def _path(row: int) -> list[int]:
    """The rows from the root to `row`."""
    parent = TREE[row][0]
    return [row] if parent is None else [*_path(parent), row]


def _path_logits(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """[rows of TREE, V]: each row at the end of its own chain, by the model's own forward."""
    rows = []
    for row in range(len(TREE)):
        chain = [*range(HISTORY), *(HISTORY + ancestor for ancestor in _path(row))]
        rows.append(reference_logits(model, ids[:, chain])[0, -1])
    return np.stack(rows)


def _largest(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """The largest difference over its row's range; NaN where either side is not finite."""
    return float((np.abs(ours - theirs).max(-1) / np.maximum(np.ptp(theirs, axis=-1), 1e-30)).max())


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")

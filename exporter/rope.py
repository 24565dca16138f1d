"""Rotary embeddings whose frequencies depend on how long the text is: LongRoPE and dynamic NTK.

transformers chooses the frequencies of all rows by the longest position of a forward, so that the logits of a row depend on
what runs with it. The contract's semantics is that of the row's own prefix: a row at position p gets what transformers computes
in one forward over the p + 1 tokens up to it. Speculation, batches, chunked prompts and plain decoding agree by construction.

- Up to the original length both kinds are fixed frequencies.
- LongRoPE beyond it: every key of the prefix, and so every hidden state, is another one with the long factors. The graph
  therefore runs both variants and keeps both caches (as more heads of one), and each row's output is chosen by its position.
  This is what transformers' Phi-3 computes in `generate`, which drops its cache where a text crosses the original length. Other
  architectures keep keys of the short factors there, so that their `generate` differs from their own forward; ours equals the
  forward.
- Dynamic NTK beyond it: every length has frequencies of its own, and no cache can hold them all. Refused.

LongRoPE: arXiv 2402.13753. Dynamic NTK: as transformers' `_compute_dynamic_ntk_parameters`.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from headstart.runtime.errors import OptionError

from .step import current_step

LONGROPE, DYNAMIC = "longrope", "dynamic"


@dataclass(frozen=True)
class Variants:
    """How many variants of the model one graph runs, and up to which length the first of them holds."""

    count: int = 1
    original: int = 0  # tokens; of no meaning where there is one variant

    def choose(self, values: Tensor, position_ids: Tensor) -> Tensor:
        """[count · B, T, H] of all variants to [B, T, H]: each row's own, by its position in [B, T]."""
        if self.count == 1:
            return values
        short, long = values.unflatten(0, (self.count, position_ids.shape[0])).unbind(0)
        return torch.where((position_ids + 1 > self.original)[..., None], long, short)


ONE = Variants()


def variants(model: Any, longest: int) -> Variants:
    """What texts of up to `longest` tokens need."""
    original = original_length(model, LONGROPE)
    return ONE if original is None or longest <= original else Variants(2, original)


def refuse_dynamic(model: Any, longest: int) -> None:
    """Raises OptionError for dynamic NTK and texts beyond the original length."""
    limit = original_length(model, DYNAMIC)
    if limit is not None and longest > limit:
        raise OptionError(
            f"rope_type dynamic has other frequencies at every length beyond {limit} tokens, which no cache of keys can hold. "
            f"Fix: --max-cache {limit}, or rope_type yarn or linear where the checkpoint was trained for it."
        )


def original_length(model: Any, kind: str) -> int | None:
    """Tokens up to which rotary embeddings of that kind do not depend on the length; None when the model has none such."""
    lengths = [
        _original(module, layer_type) for module in _rotaries(model) for layer_type, rope in _kinds(module) if kind in rope
    ]
    return min(lengths, default=None)


@contextlib.contextmanager
def explicit_lengths(model: Any, chosen: Variants) -> Iterator[None]:
    """While open, rotary embeddings give cosines and sines of all variants, [count · B, T, D], at the step's positions."""
    patched = [module for module in _rotaries(model) if any(_depends(rope) for _, rope in _kinds(module))]
    try:
        for module in patched:
            module.forward = _all_variants(module, chosen.count)
        yield
    finally:
        for module in patched:
            del module.forward


def _all_variants(module: Any, count: int) -> Callable[..., tuple[Tensor, ...]]:
    inner = inspect.unwrap(type(module).forward)  # without the choice by length
    fixed = [_Fixed(module, _frequencies(module, is_long)) for is_long in (False, True)[:count]]

    def forward(x: Tensor, position_ids: Tensor, *others: Any, **named: Any) -> tuple[Tensor, ...]:
        positions = current_step().position_ids
        return tuple(map(torch.cat, zip(*(inner(each, x, positions, *others, **named) for each in fixed), strict=True)))

    return forward


class _Fixed:
    """Stands for a rotary module in its own forward, with other frequencies."""

    def __init__(self, module: Any, frequencies: dict[str, Tensor]) -> None:
        self._module, self._frequencies = module, frequencies

    def __getattr__(self, name: str) -> Any:
        return self._frequencies[name] if name in self._frequencies else getattr(self._module, name)


def _frequencies(module: Any, is_long: bool) -> dict[str, Tensor]:
    """The module's buffers of frequencies by name, for texts within the original length or beyond it."""
    buffers = {}
    for layer_type, rope in _kinds(module):
        prefix = f"{layer_type}_" if layer_type else ""
        frequencies = getattr(module, f"{prefix}original_inv_freq", None)
        if is_long and rope == LONGROPE:
            typed = {"layer_type": layer_type} if layer_type else {}
            length = _original(module, layer_type) + 1
            frequencies, _ = ROPE_INIT_FUNCTIONS[rope](module.config, None, seq_len=length, **typed)
        if frequencies is not None:
            buffers[f"{prefix}inv_freq"] = frequencies.detach().clone()
    return buffers


def _rotaries(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "rope_type", None), str | dict)]


def _kinds(module: Any) -> list[tuple[str, str]]:
    """(layer type, rope type) of each set of frequencies; the layer type is empty where there is one set."""
    return list(module.rope_type.items()) if isinstance(module.rope_type, dict) else [("", module.rope_type)]


def _depends(rope: str) -> bool:
    return rope == LONGROPE or DYNAMIC in rope


def _original(module: Any, layer_type: str) -> int:
    parameters = module.config.rope_parameters
    parameters = parameters[layer_type] if layer_type else parameters
    if DYNAMIC in parameters["rope_type"]:
        return int(module.original_max_seq_len)
    return int(parameters["original_max_position_embeddings"])

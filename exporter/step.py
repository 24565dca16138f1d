"""One step of a decoder while it is traced: its positions, its slots, and what stands in them.

A traced model is called by transformers' own code, which passes none of this on. It is therefore kept per thread, in a context
variable. Knows nothing of single architectures or of files.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Step:
    """What the attention function needs beyond its arguments, during one traced forward."""

    position_ids: Tensor  # [B, T] int64
    write_index: Tensor  # [B] int64
    caches: list[Tensor]  # key, value, key, value, …; each [B, G, S, D]
    cross_mask: Tensor | None = None  # [B, 1, T, E] bool, which source rows cross-attention may see
    variants: int = 1  # of the model, run together; see `rope`. Their heads are joined in the caches
    windowed: bool = True  # sliding windows are put into the mask here; an encoder's masks hold theirs already
    attended: set[int] = field(default_factory=set)  # layers whose self-attention went through us
    cross_queries: list[Tensor] | None = None  # [B, heads, T, D] of each cross-attention, scaled; None keeps none
    slot_positions: Tensor | None = None  # [B, S], filled when a sliding window or a relative bias asks


_step: ContextVar[Step] = ContextVar("headstart_step")


def current_step() -> Step:
    """The step of the forward being traced."""
    return _step.get()


@contextlib.contextmanager
def during(step: Step) -> Iterator[None]:
    """Make `step` the current one."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


class SlotCache:
    """The cache object transformers sees: rows are written to fixed slots, and all slots are returned."""

    is_compileable = False

    def __init__(self, step: Step) -> None:
        self.step = step

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        caches, index = self.step.caches, self.step.write_index
        key, value = (joined_heads(new, self.step.variants) for new in (key, value))
        caches[2 * layer_idx] = tensor_scatter(caches[2 * layer_idx], key, index)
        caches[2 * layer_idx + 1] = tensor_scatter(caches[2 * layer_idx + 1], value, index)
        return caches[2 * layer_idx], caches[2 * layer_idx + 1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # only read to make positions and masks, and both are inputs here


def joined_heads(rows: Tensor, variants: int) -> Tensor:
    """[variants · B, G, T, D] as [B, variants · G, T, D]."""
    return rows if variants == 1 else rows.unflatten(0, (variants, -1)).transpose(0, 1).flatten(1, 2)


def parted_heads(rows: Tensor, variants: int) -> Tensor:
    """The inverse of `joined_heads`."""
    return rows if variants == 1 else rows.unflatten(1, (variants, -1)).transpose(0, 1).flatten(0, 1)


def tensor_scatter(cache: Tensor, new: Tensor, write_index: Tensor) -> Tensor:
    """ONNX TensorScatter: `new` [B, G, T, D] into slots write_index … write_index + T - 1 of `cache` [B, G, S, D]."""
    if not torch.onnx.is_in_onnx_export():
        slots = write_index[:, None, None, None] + torch.arange(new.shape[2])[None, None, :, None]
        return cache.scatter(2, slots.expand(new.shape), new)
    inputs = (cache, new, write_index)
    result: Tensor = torch.onnx.ops.symbolic(
        "TensorScatter", inputs, {"axis": 2}, dtype=cache.dtype, shape=cache.shape, version=24
    )
    return result


def inside_window(step: Step, slots: int, window: int) -> Tensor:
    """[B, 1, T, S] bool: the slot's position lies fewer than `window` before the row's."""
    distance = step.position_ids[:, :, None] - slot_positions(step, slots)[:, None, :]
    return (distance < window)[:, None]


def slot_positions(step: Step, slots: int) -> Tensor:
    """[B, S] int64: the position of what stands in each slot.

    A committed slot holds the position of its own index; the rows being written hold theirs, which in a tree
    are not the slot's.
    """
    if step.slot_positions is None:
        batch = step.position_ids.shape[0]
        positions = torch.arange(slots, device=step.position_ids.device)[None, None, :, None].expand(batch, 1, slots, 1)
        written = tensor_scatter(positions, step.position_ids[:, None, :, None], step.write_index)
        step.slot_positions = written[:, 0, :, 0]
    return step.slot_positions

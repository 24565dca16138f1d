"""What single encoder-decoder architectures count, pad or mask on their own, put on the contract's terms while tracing.

The contract's positions are an input, since the rows of a draft tree do not stand in a line. Most architectures take them;
those that count rows themselves, or store a distance table, are told here.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from headstart.runtime.errors import CheckpointError

from .tracing import current_step, inside_window, slot_positions


@contextlib.contextmanager
def explicit_positions(model: Any) -> Iterator[None]:
    """While open, the decoder reads the step's positions, and nothing depends on how many rows stand beside a row.

    Raises CheckpointError for a decoder whose way of counting is not known.
    """
    patched: list[tuple[Any, str]] = []
    kept = [(module, module.head_dim_padding) for module in model.modules() if hasattr(module, "head_dim_padding")]
    try:
        for module, name, ours in _replacements(model):
            setattr(module, name, ours)
            patched.append((module, name))
        for module, _ in kept:
            module.head_dim_padding = 0  # Moonshine pads heads with zeros for its kernels; here it would pad whole caches
        yield
    finally:
        for module, name in patched:
            delattr(module, name)
        for module, padding in kept:
            module.head_dim_padding = padding


def decoder_inputs(decoder: Any, mask: Tensor) -> dict[str, Any]:
    """Masks and positions of the current step, as far as the decoder takes them. `mask` [B, 1, T, S] bool.

    T5Gemma 2 joins self- and cross-attention, so its window has to be in the mask before the source's columns are.
    """
    step = current_step()
    masks: Any = mask
    if type(decoder).__name__.startswith("T5Gemma2"):
        window = inside_window(step, mask.shape[-1], decoder.config.sliding_window)
        masks = {"full_attention": mask, "sliding_attention": mask & window}
    ours = {"attention_mask": masks, "encoder_attention_mask": step.cross_mask, "position_ids": step.position_ids}
    return {name: value for name, value in ours.items() if _takes(decoder, name)}


class _NotAll:
    """Stands for `torch.isfinite(x)` while tracing."""

    def all(self) -> bool:
        return False


@contextlib.contextmanager
def always_clamped(model: Any) -> Iterator[None]:
    """In float16 BART and Marian clamp their states where one has overflowed, a branch no graph has; here they always do."""
    kept = torch.isfinite
    if model.dtype == torch.float16:
        torch.isfinite = lambda _: _NotAll()
    try:
        yield
    finally:
        torch.isfinite = kept


def _takes(module: Any, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _replacements(model: Any) -> Iterator[tuple[Any, str, Callable[..., Tensor]]]:
    """(module, method, our method) for all that counts."""
    encoder, decoder = model.get_encoder(), model.get_decoder()
    biased = [module for module in model.modules() if getattr(module, "has_relative_attention_bias", False)]
    for module in biased:
        yield module, "compute_bias", _relative_bias(module)
    counted = getattr(encoder, "embed_positions", None)
    if hasattr(counted, "create_position_ids_from_input_ids"):
        yield counted, "forward", _positions_behind_padding(counted)
    for module in model.modules():
        if hasattr(module, "eoi_embedding"):
            yield module, "forward", _with_end_of_image(module)
    if _takes(decoder, "position_ids") or any(module.is_decoder for module in biased):
        return
    positions = getattr(decoder, "embed_positions", None)
    if positions is None:
        raise CheckpointError(
            f"{type(decoder).__name__} is not supported: it counts positions in a way that is not known. "
            "Nearest supported: T5, BART, Marian, Pegasus, M2M-100, Blenderbot, T5Gemma, Whisper, Moonshine, Speech2Text."
        )
    yield positions, "forward", _embedded_positions(positions)


def _relative_bias(module: Any) -> Callable[..., Tensor]:
    """T5's bias looked up by distance. The table comes from the module's own code: beyond the largest distance it is flat."""
    most = module.relative_attention_max_distance
    distances = most + 1 if module.is_decoder else 2 * most + 1
    with torch.no_grad():
        table = module.compute_bias(1, distances, past_seen_tokens=most)[0, :, 0].T.contiguous()  # [distances, heads]

    def compute_bias(query_length: int, key_length: int, **_: Any) -> Tensor:
        if module.is_decoder:
            step = current_step()
            relative = slot_positions(step, key_length)[:, None, :] - step.position_ids[:, :, None]
        else:
            places = torch.arange(key_length)
            relative = (places[None, :] - places[:, None])[None]
        index = relative.clamp(-most, distances - 1 - most) + most
        return embedding(index, table).permute(0, 3, 1, 2)  # [B or 1, heads, T, S]

    return compute_bias


def _positions_behind_padding(module: Any) -> Callable[..., Tensor]:
    """M2M-100 and Speech2Text, encoder: padding has no position. Their own code may also make the table longer."""

    def forward(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return embedding(module.create_position_ids_from_input_ids(input_ids, module.padding_idx, 0), module.weights)

    return forward


def _with_end_of_image(module: Any) -> Callable[..., Tensor]:
    """T5Gemma 2 keeps one token's embedding apart and writes it over the looked-up rows, which no TensorRT parser takes."""

    def forward(input_ids: Tensor) -> Tensor:
        rows = embedding(input_ids, module.weight) * module.embed_scale.to(module.weight.dtype)
        return torch.where((input_ids == module.eoi_token_index)[..., None], module.eoi_embedding.to(rows.dtype), rows)

    return forward


def _embedded_positions(module: Any) -> Callable[..., Tensor]:
    """Learned or sinusoidal positions of a decoder, [B, T, H]: one row of a table each."""
    if not hasattr(module, "create_position_ids_from_input_ids"):
        return lambda *_, **__: embedding(current_step().position_ids + getattr(module, "offset", 0), module.weight)
    padding = module.padding_idx

    def forward(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        index = torch.where(input_ids == padding, padding, current_step().position_ids + padding + 1)
        return embedding(index, module.weights)

    return forward


def refuse_sparse(model: Any) -> None:
    """Raises CheckpointError for attention that changes with the length of the source: a traced graph has one form."""
    if getattr(model.config, "attention_type", None) == "block_sparse":
        raise CheckpointError(
            f"{type(model).__name__} is not supported: its encoder sees blocks of a long source, and all of a short one. "
            'Fix: "attention_type": "original_full" in config.json, at that attention\'s cost.'
        )


def encoder_masks(encoder: Any, mask: Tensor) -> Any:
    """What the encoder takes as its mask: [B, 1, E, E] bool, or one for each kind of layer where some see a window."""
    config = encoder.config.get_text_config()
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return mask
    inside = _window(encoder, config.sliding_window)
    places = torch.arange(mask.shape[-1])
    return {"full_attention": mask, "sliding_attention": mask & inside(0, 0, places[:, None], places[None, :])}


def _window(encoder: Any, size: int) -> Callable[..., Tensor]:
    """transformers' own rule by (batch, head, row, column); T5Gemma's two generations count the window's ends differently."""
    if type(encoder).__name__.startswith("T5Gemma2"):
        from transformers.models.t5gemma2.modeling_t5gemma2 import sliding_window_mask_function

        second: Callable[..., Tensor] = sliding_window_mask_function(size, is_causal=False)
        return second
    from transformers.masking_utils import sliding_window_bidirectional_overlay

    first: Callable[..., Tensor] = sliding_window_bidirectional_overlay(size)
    return first

"""What single architectures count, pad or mask on their own, replaced by the contract's terms while tracing.

The contract's positions are an input, since the rows of a draft tree are not consecutive. Most architectures take them. The
others are patched here, by kind rather than by class:

1. a table of positions that a decoder indexes by the length of its cache (BART, Pegasus, OPT's relatives);
2. embeddings that number positions from padding_idx + 1 when they are given none (the RoBERTa family);
3. a table of distances (T5).

Whatever counts in another way is found by `conformance`, which runs the patched model.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode

from headstart.runtime.errors import CheckpointError

from .step import current_step, inside_window, slot_positions


@contextlib.contextmanager
def explicit_positions(model: Any) -> Iterator[None]:
    """While open, the decoder reads the step's positions, and no row depends on how many rows run with it.

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
    """Masks and positions of the current step for the decoder of an encoder-decoder. `mask` [B, 1, T, S] bool.

    T5Gemma 2 joins self- and cross-attention, so its window has to be in the mask before the source's columns are.
    Positions are left out where the decoder takes none: `explicit_positions` has then replaced what computes them. So is the
    source's mask (Whisper): our attention falls back to the step's own.

    Raises CheckpointError for a decoder that takes no mask: without one it would see what it must not.
    """
    require_inputs(decoder, "attention_mask")
    step = current_step()
    masks: Any = mask
    if type(decoder).__name__.startswith("T5Gemma2"):
        window = inside_window(step, mask.shape[-1], decoder.config.sliding_window)
        masks = {"full_attention": mask, "sliding_attention": mask & window}
    optional = {"encoder_attention_mask": step.cross_mask, "position_ids": step.position_ids}
    return {"attention_mask": masks} | {name: value for name, value in optional.items() if takes(decoder, name)}


def require_inputs(module: Any, *names: str) -> None:
    """Raises CheckpointError unless the module's forward takes all of these by name; others it may drop in silence."""
    missing = [name for name in names if not takes(module, name)]
    if missing:
        raise CheckpointError(
            f"{type(module).__name__} is not supported: in the installed transformers its forward takes no "
            f"{' and no '.join(missing)}, which the graph contract hands it. Fix: a transformers release that Headstart was "
            "tested with, see constraints.txt."
        )


class _NotAll:
    """Stands for `torch.isfinite(x)` while tracing."""

    def all(self) -> bool:
        return False


class _AlwaysClamped(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """Answers `torch.isfinite` with `_NotAll`. Function modes belong to one thread, and this one is open during one forward."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _NotAll() if func is torch.isfinite else func(*args, **(kwargs or {}))


def always_clamped(model: Any) -> contextlib.AbstractContextManager[Any]:
    """In float16 BART and Marian clamp their states where one has overflowed, a branch no graph has; here they always do.

    To be open during a forward of `model` alone.
    """
    return _AlwaysClamped() if model.dtype == torch.float16 else contextlib.nullcontext()


def takes(module: Any, name: str) -> bool:
    """Whether the module's forward has a parameter of that name."""
    return name in inspect.signature(module.forward).parameters


def _replacements(model: Any) -> Iterator[tuple[Any, str, Callable[..., Tensor]]]:
    """(module, method, our method) for all that counts."""
    if model.config.is_encoder_decoder:
        yield from _encoder_replacements(model)
        yield from _decoder_replacements(model.get_decoder())
    else:
        yield from _causal_replacements(model)


def _causal_replacements(model: Any) -> Iterator[tuple[Any, str, Callable[..., Tensor]]]:
    for module in model.modules():
        if shift := position_shift(module):
            yield module, "forward", _shifted(module, shift)
        table = getattr(module, "embed_positions", None)
        if isinstance(table, torch.nn.Module) and not takes(model, "position_ids"):
            yield table, "forward", _embedded_positions(table)


def _encoder_replacements(model: Any) -> Iterator[tuple[Any, str, Callable[..., Tensor]]]:
    counted = getattr(model.get_encoder(), "embed_positions", None)
    if hasattr(counted, "create_position_ids_from_input_ids"):
        yield counted, "forward", _positions_without_padding(counted)
    for module in model.modules():
        if getattr(module, "has_relative_attention_bias", False):
            yield module, "compute_bias", _relative_bias(module)
        if hasattr(module, "eoi_embedding"):
            yield module, "forward", _with_end_of_image(module)


def _decoder_replacements(decoder: Any) -> Iterator[tuple[Any, str, Callable[..., Tensor]]]:
    for module in decoder.modules():
        if shift := position_shift(module):
            yield module, "forward", _shifted(module, shift)
    biased = any(getattr(module, "has_relative_attention_bias", False) for module in decoder.modules())
    if takes(decoder, "position_ids") or biased:
        return
    positions = getattr(decoder, "embed_positions", None)
    if positions is None:
        raise CheckpointError(
            f"{type(decoder).__name__} is not supported: it counts positions in a way that is not known. "
            "Nearest supported: T5, BART, Marian, Pegasus, M2M-100, Blenderbot, T5Gemma, Whisper, Moonshine, Speech2Text."
        )
    yield positions, "forward", _embedded_positions(positions)


def position_shift(module: Any) -> int:
    """What embeddings with a table of positions add to the contract's, 0, 1, …, when they number positions themselves.

    Asked by running them: RoBERTa and its relatives give padding_idx + 1. 0 for any other module.
    """
    if not (hasattr(module, "position_embeddings") and takes(module, "input_ids") and takes(module, "position_ids")):
        return 0
    token_ids = torch.tensor([[token for token in range(4) if token != getattr(module, "padding_idx", None)][:3]])
    positions = torch.arange(3)[None]
    with torch.no_grad():
        own = module(input_ids=token_ids)
        shifts = (0, (getattr(module, "padding_idx", None) or 0) + 1)
        fitting = [s for s in shifts if torch.allclose(own, module(input_ids=token_ids, position_ids=positions + s))]
    if not fitting:
        raise CheckpointError(f"{type(module).__name__} is not supported: it numbers positions in a way that is not known.")
    return fitting[0]


def shifted_embeddings(model: Any) -> list[tuple[Any, int]]:
    """(embeddings, shift) of those with a `position_shift`."""
    return [(module, shift) for module in model.modules() if (shift := position_shift(module))]


def longest_by_tables(model: Any, stated: int | None) -> int | None:
    """The longest text that the configuration states, less the rows of position tables that stand for no position."""
    return min([table.position_embeddings.num_embeddings - shift for table, shift in shifted_embeddings(model)], default=stated)


def _shifted(module: Any, shift: int) -> Callable[..., Tensor]:
    """Embeddings of the contract's positions; padding has one of its own, and is given what the module gives it."""
    inner, padding = module.forward, module.padding_idx

    def forward(input_ids: Tensor, position_ids: Tensor, **others: Any) -> Tensor:
        index = torch.where(input_ids == padding, padding, position_ids + shift)
        embedded: Tensor = inner(input_ids=input_ids, position_ids=index, **others)
        return embedded

    return forward


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


def _positions_without_padding(module: Any) -> Callable[..., Tensor]:
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

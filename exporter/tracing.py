"""Trace a transformers decoder into the canonical graph.

Most architectures of transformers fetch their attention from one registry and hand their keys and values to one cache
object. Registering our attention and passing our cache is therefore enough to give any of them explicit positions, an
explicit mask and a preallocated cache. Knows nothing of files or of single architectures.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headstart.runtime import contract
from headstart.runtime.bundle import KeyValueInfo
from headstart.runtime.errors import CheckpointError

from .architectures import always_clamped, explicit_positions, require_inputs, takes
from .rope import ONE, Variants, explicit_lengths
from .step import SlotCache, Step, current_step, during, inside_window, joined_heads, parted_heads
from .translator import translated

ATTENTION = "headstart"
# Sizes of the traced example. All differ, so that no two dynamic axes are taken for one.
EXAMPLE = {"batch": 2, "rows": 3, "slots": 32, "chosen": 5}
# Arguments an architecture may pass to its attention that change the result and that we do not compute.
REFUSED = ("s_aux", "head_mask", "block_mask", "indexer")


def attention(
    module: torch.nn.Module,
    query: Tensor,  # [B, heads, T, D]
    key: Tensor,  # [B, G, S, D]
    value: Tensor,  # [B, G, S, Dv]
    attention_mask: Tensor | None,  # [B, 1, T, S] bool
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,  # [B or 1, heads, T, S], added to the scores
    **others: Any,
) -> tuple[Tensor, None]:
    """The registered attention: mask, sliding window from positions, bias, soft cap. Returns [B, T, heads, Dv].

    Cross-attention is told by its mask: the step's own, or none at all where an architecture never masks its source.
    """
    refused = [name for name in REFUSED if others.get(name) is not None]
    if refused:
        raise CheckpointError(
            f"{type(module).__name__} passes {', '.join(refused)} to its attention, which is not supported yet."
        )
    step = current_step()
    query = joined_heads(query, step.variants)
    mask = step.cross_mask if attention_mask is None else attention_mask
    if mask is None or mask is not step.cross_mask:
        step.attended.add(getattr(module, "layer_idx", len(step.attended)))
        if sliding_window is not None and mask is not None and step.windowed:
            mask = mask & inside_window(step, key.shape[2], sliding_window)
        if position_bias is not None and mask is not None:
            mask = torch.where(mask, position_bias, torch.finfo(query.dtype).min)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if step.cross_queries is not None and mask is not None and mask is step.cross_mask:
        step.cross_queries.append(query if scale == 1 else query * scale)
    if softcap is not None or not torch.onnx.is_in_onnx_export():
        # Spelled out: whether every runtime's operator caps before it masks, as the checkpoints do, was not checked.
        result = _attention_from_primitives(query, key, value, mask, scale, softcap)
    else:
        shape = (*query.shape[:3], value.shape[-1])
        inputs = (query, key, value) if mask is None else (query, key, value, mask)
        result = torch.onnx.ops.symbolic("Attention", inputs, {"scale": scale}, dtype=query.dtype, shape=shape, version=24)
    return parted_heads(result, step.variants).transpose(1, 2).contiguous(), None


def _attention_from_primitives(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """MatMul, soft cap, mask, Softmax, MatMul, with the query heads of one key/value head folded into its rows."""
    batch, heads, rows, size = query.shape
    groups = key.shape[1]
    query = query.reshape(batch, groups, heads // groups * rows, size)
    scores = (query @ key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.reshape(batch, heads, rows, -1)
    if mask is not None:
        least = torch.finfo(scores.dtype).min
        scores = torch.where(mask, scores, least) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = weights.reshape(batch, groups, heads // groups * rows, -1)
    return (weights @ value).reshape(batch, heads, rows, value.shape[-1])


@contextlib.contextmanager
def our_attention(model: Any) -> Iterator[None]:
    """Let every layer of the model attend through us. An encoder and a decoder may each hold a copy of the configuration."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    previous = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = previous[key]


class DecoderGraph(torch.nn.Module):
    """The model as the contract sees it: positional tensors in, logits, hidden, [aux_hidden] and caches out."""

    def __init__(self, model: Any, aux_layers: tuple[int, ...] = (), variants: Variants = ONE) -> None:
        super().__init__()
        self.model = model
        self.aux_layers = aux_layers
        self.variants = variants

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        write_index: Tensor,
        output_rows: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, ...]:
        count = self.variants.count
        step = Step(position_ids, write_index, list(caches), variants=count)
        ids, positions = (rows.repeat(count, 1) if count > 1 else rows for rows in (input_ids, position_ids))

        def choose(values: Tensor) -> Tensor:
            return self.variants.choose(values, position_ids)

        with during(step), always_clamped(self.model), chosen_rows(self.model, output_rows, choose) as captured:
            out = self.model(
                input_ids=ids,
                attention_mask=attention_mask,
                past_key_values=SlotCache(step),
                use_cache=True,
                output_hidden_states=bool(self.aux_layers),
                **_positions(self.model, positions),
            )
        check_attended(self.model, step)
        aux = [torch.cat([choose(out.hidden_states[i]) for i in self.aux_layers], dim=-1)] if self.aux_layers else []
        return (out.logits, captured[0], *aux, *step.caches)


def _positions(model: Any, position_ids: Tensor) -> dict[str, Tensor]:
    """Nothing where the model takes no positions: `explicit_positions` has then replaced what computes them."""
    return {"position_ids": position_ids} if takes(model, "position_ids") else {}


@contextlib.contextmanager
def chosen_rows(
    model: Any, output_rows: Tensor, choose: Callable[[Tensor], Tensor] = lambda values: values
) -> Iterator[list[Tensor]]:
    """Keep what the LM head reads ([B, T, H], after the final norm; yielded), and hand it the chosen rows only.

    Hooking there leaves whatever the architecture does after the LM head (soft caps, logit scales) in place. `choose` makes
    [B, T, H] of what the model's variants give.
    """
    captured: list[Tensor] = []

    def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        captured.append(choose(args[0]))
        index = output_rows[:, :, None].expand(-1, -1, args[0].shape[-1])
        return (torch.gather(captured[0], 1, index),)

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield captured
    finally:
        handle.remove()


def check_attended(model: Any, step: Step) -> None:
    """Raises CheckpointError unless every layer that has a cache attended through us."""
    layers = len(step.caches) // 2
    if len(step.attended) != layers:
        raise CheckpointError(not_through_us(model, len(step.attended), layers))


def not_through_us(model: Any, attended: int, layers: int) -> str:
    return (
        f"{type(model).__name__} is not supported: {attended} of its {layers} layers attend through transformers' attention "
        "interface, and the graph contract needs all of them. Nearest supported: Llama, Qwen, Mistral, Gemma, Phi-3, GPT-2, "
        "GPT-NeoX, OPT, StableLM, SmolLM3, OLMo 2."
    )


class ShapeProbe:
    """A cache that only notes the shape of each layer's keys and values."""

    is_compileable = False

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.shapes[layer_idx] = (key.shape[1], key.shape[3], value.shape[3])
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def cache_infos(model: Any, variants: Variants = ONE) -> tuple[KeyValueInfo, ...]:
    """The caches the model asks for, found by running two tokens through it.

    Raises CheckpointError when it keeps other state than one key and value cache per layer.
    """
    require_inputs(model, "attention_mask", "past_key_values")
    probe = ShapeProbe()
    positions = torch.arange(2)[None]
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    step = Step(positions, torch.zeros(1, dtype=torch.long), [])
    try:
        with during(step), on_the_contract(model, ONE), torch.no_grad():
            model(
                input_ids=torch.zeros(1, 2, dtype=torch.long),
                attention_mask=mask,
                past_key_values=probe,
                use_cache=True,
                **_positions(model, positions),
            )
    except CheckpointError:
        raise
    except Exception as error:  # an architecture's code may fail in any way on a cache or a mask it does not expect
        raise CheckpointError(
            f"{type(model).__name__} is not supported: it needs more of its cache or inputs than keys, values, mask and "
            f"positions ({error}). Nearest supported: a decoder with plain attention layers, such as Llama or Qwen3."
        ) from error
    layers = decoder_layers(model)
    if sorted(probe.shapes) != list(range(layers)):
        raise CheckpointError(not_through_us(model, len(probe.shapes), layers))
    sizes = [probe.shapes[layer] for layer in range(layers)]
    return tuple(
        KeyValueInfo(contract.key_name(i), contract.value_name(i), variants.count * heads, key, value, dtype_of(model))
        for i, (heads, key, value) in enumerate(sizes)
    )


def dtype_of(model: Any) -> str:
    """numpy's name of the type a model computes in."""
    return str(model.dtype).removeprefix("torch.")


def decoder_layers(model: Any) -> int:
    """Of a decoder: one that was half of an encoder-decoder keeps the encoder's number as `num_hidden_layers`."""
    config = model.config.get_text_config()
    return int(getattr(config, "decoder_layers", None) or config.num_hidden_layers)


@contextlib.contextmanager
def on_the_contract(model: Any, variants: Variants) -> Iterator[None]:
    """While open, the model attends through us, and reads positions and lengths from the step alone."""
    with our_attention(model), explicit_positions(model), explicit_lengths(model, variants):
        yield


def trace_decoder(
    model: Any, caches: tuple[KeyValueInfo, ...], aux_layers: tuple[int, ...] = (), variants: Variants = ONE
) -> Any:
    """The canonical decoder as an onnx_ir Model with the contract's input and output names.

    Raises CheckpointError when the model does not fit the contract.
    """
    program = to_onnx(DecoderGraph(model, aux_layers, variants), example_inputs(model, caches), dynamic_shapes(len(caches)))
    cache_names = [name for cache in caches for name in (cache.key_name, cache.value_name)]
    rename(program.model.graph.inputs, [*contract.STEP_INPUTS, *cache_names])
    aux = [contract.AUX_HIDDEN] if aux_layers else []
    rename(program.model.graph.outputs, [contract.LOGITS, contract.HIDDEN, *aux, *map(contract.updated, cache_names)])
    return program.model


def to_onnx(graph: torch.nn.Module, inputs: tuple[Any, ...], axes: tuple[Any, ...]) -> Any:
    """Trace a wrapper of a model (its attribute `model`) into an ONNX program.

    Raises CheckpointError when the model's code has no form as one graph.
    """
    model: Any = graph.model
    with on_the_contract(model, getattr(graph, "variants", ONE)):
        try:
            return translated(graph, inputs, axes)
        except torch.onnx.OnnxExporterError as error:
            reason = error.__cause__ or error
            raise CheckpointError(
                f"{type(model).__name__} is not supported: its code cannot be traced into one graph "
                f"({str(reason).splitlines()[0]}). Nearest supported: a decoder such as Llama or Qwen3, "
                "or an encoder-decoder such as T5, BART or Whisper."
            ) from error


def example_inputs(model: Any, caches: tuple[KeyValueInfo, ...]) -> tuple[Any, ...]:
    batch, rows, slots, chosen = EXAMPLE.values()
    whole = {"dtype": torch.long}
    buffers = [
        torch.zeros(batch, cache.kv_heads, slots, size, dtype=model.dtype)
        for cache in caches
        for size in (cache.key_size, cache.value_size)
    ]
    return (
        torch.zeros(batch, rows, **whole),
        torch.zeros(batch, rows, **whole),
        torch.ones(batch, 1, rows, slots, dtype=torch.bool),
        torch.zeros(batch, **whole),
        torch.zeros(batch, chosen, **whole),
        buffers,
    )


def dynamic_shapes(layers: int) -> tuple[Any, ...]:
    batch, rows, slots, chosen = (torch.export.Dim(name) for name in EXAMPLE)
    return (
        {0: batch, 1: rows},
        {0: batch, 1: rows},
        {0: batch, 2: rows, 3: slots},
        {0: batch},
        {0: batch, 1: chosen},
        [{0: batch, 2: slots}] * (2 * layers),
    )


def rename(values: Any, names: list[str]) -> None:
    assert len(values) == len(names), f"{len(values)} values for {len(names)} names"
    for value, name in zip(values, names, strict=True):
        value.name = name

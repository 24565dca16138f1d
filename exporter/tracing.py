"""Trace a transformers decoder into the canonical graph.

Most architectures of transformers fetch their attention from one registry and hand their keys and values to one cache
object. Registering our attention and passing our cache is therefore enough to give any of them explicit positions, an
explicit mask and a preallocated cache. Knows nothing of files or of single architectures.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headstart.runtime import contract
from headstart.runtime.bundle import CacheInfo
from headstart.runtime.errors import CheckpointError

ATTENTION = "headstart"
# Sizes of the traced example. All differ, so that no two dynamic axes are taken for one.
EXAMPLE = {"batch": 2, "rows": 3, "slots": 32, "chosen": 5}
# Arguments an architecture may pass to its attention that change the result and that we do not compute.
REFUSED = ("s_aux", "head_mask", "block_mask", "indexer")


@dataclass
class Step:
    """What the attention function needs beyond its arguments, during one traced forward."""

    position_ids: Tensor  # [B, T] int64
    write_index: Tensor  # [B] int64
    caches: list[Tensor]  # key, value, key, value, …; each [B, G, S, D]
    cross_mask: Tensor | None = None  # [B, 1, T, E] bool, which source rows cross-attention may see
    windowed: bool = True  # sliding windows are put into the mask here; an encoder's masks hold theirs already
    attended: set[int] = field(default_factory=set)  # layers whose self-attention went through us
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
        caches[2 * layer_idx] = tensor_scatter(caches[2 * layer_idx], key, index)
        caches[2 * layer_idx + 1] = tensor_scatter(caches[2 * layer_idx + 1], value, index)
        return caches[2 * layer_idx], caches[2 * layer_idx + 1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # only read to make positions and masks, and both are inputs here


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
    mask = step.cross_mask if attention_mask is None else attention_mask
    if mask is None or mask is not step.cross_mask:
        step.attended.add(getattr(module, "layer_idx", len(step.attended)))
        if sliding_window is not None and mask is not None and step.windowed:
            mask = mask & inside_window(step, key.shape[2], sliding_window)
        if position_bias is not None and mask is not None:
            mask = torch.where(mask, position_bias, torch.finfo(query.dtype).min)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if softcap is not None or not torch.onnx.is_in_onnx_export():
        # Spelled out: whether every runtime's operator caps before it masks, as the checkpoints do, was not checked.
        result = _attention_from_primitives(query, key, value, mask, scale, softcap)
    else:
        shape = (*query.shape[:3], value.shape[-1])
        inputs = (query, key, value) if mask is None else (query, key, value, mask)
        result = torch.onnx.ops.symbolic("Attention", inputs, {"scale": scale}, dtype=query.dtype, shape=shape, version=24)
    return result.transpose(1, 2).contiguous(), None


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

    def __init__(self, model: Any, aux_layers: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.model = model
        self.aux_layers = aux_layers

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        write_index: Tensor,
        output_rows: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, ...]:
        step = Step(position_ids, write_index, list(caches))
        with during(step), chosen_rows(self.model, output_rows) as captured:
            out = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                past_key_values=SlotCache(step),
                use_cache=True,
                output_hidden_states=bool(self.aux_layers),
            )
        check_attended(self.model, step)
        aux = [torch.cat([out.hidden_states[i] for i in self.aux_layers], dim=-1)] if self.aux_layers else []
        return (out.logits, captured[0], *aux, *step.caches)


@contextlib.contextmanager
def chosen_rows(model: Any, output_rows: Tensor) -> Iterator[list[Tensor]]:
    """Keep what the LM head reads ([B, T, H], after the final norm; yielded), and hand it the chosen rows only.

    Hooking there leaves whatever the architecture does after the LM head (soft caps, logit scales) in place.
    """
    captured: list[Tensor] = []

    def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        captured.append(args[0])
        index = output_rows[:, :, None].expand(-1, -1, args[0].shape[-1])
        return (torch.gather(args[0], 1, index),)

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


def cache_infos(model: Any) -> tuple[CacheInfo, ...]:
    """The caches the model asks for, found by running two tokens through it.

    Raises CheckpointError when it keeps other state than one key and value cache per layer.
    """
    probe = ShapeProbe()
    positions = torch.arange(2)[None]
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    step = Step(positions, torch.zeros(1, dtype=torch.long), [])
    try:
        with during(step), our_attention(model), torch.no_grad():
            model(
                input_ids=torch.zeros(1, 2, dtype=torch.long),
                position_ids=positions,
                attention_mask=mask,
                past_key_values=probe,
                use_cache=True,
            )
    except CheckpointError:
        raise
    except Exception as error:  # an architecture's code may fail in any way on a cache or a mask it does not expect
        raise CheckpointError(
            f"{type(model).__name__} is not supported: it needs more of its cache or inputs than keys, values, mask and "
            f"positions ({error}). Nearest supported: a decoder with plain attention layers, such as Llama or Qwen3."
        ) from error
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(probe.shapes) != list(range(layers)):
        raise CheckpointError(not_through_us(model, len(probe.shapes), layers))
    return tuple(CacheInfo(contract.key_name(i), contract.value_name(i), *probe.shapes[i]) for i in range(layers))


def trace_decoder(model: Any, caches: tuple[CacheInfo, ...], aux_layers: tuple[int, ...] = ()) -> Any:
    """The canonical decoder as an onnx_ir Model with the contract's input and output names.

    Raises CheckpointError when the model does not fit the contract.
    """
    wrapper = DecoderGraph(model, aux_layers).eval()
    with our_attention(model), torch.no_grad(), quiet_exporter():
        program = torch.onnx.export(
            wrapper,
            example_inputs(model, caches),
            dynamo=True,
            dynamic_shapes=dynamic_shapes(len(caches)),
            opset_version=contract.OPSET,
            optimize=True,
            verbose=False,
        )
    cache_names = [name for cache in caches for name in (cache.key_name, cache.value_name)]
    rename(program.model.graph.inputs, [*contract.STEP_INPUTS, *cache_names])
    aux = [contract.AUX_HIDDEN] if aux_layers else []
    rename(program.model.graph.outputs, [contract.LOGITS, contract.HIDDEN, *aux, *map(contract.updated, cache_names)])
    return program.model


def example_inputs(model: Any, caches: tuple[CacheInfo, ...]) -> tuple[Any, ...]:
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


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    # It warns about torchvision, treespec internals and axis names, none of which a user can act on.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

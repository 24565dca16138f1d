"""Trace an encoder-decoder into two canonical graphs.

The encoder's graph also computes what every decoder layer reads of the source, the cross-attention's keys and values: they
are found by running the decoder once with a cache that records them. The decoder's graph takes them as inputs, from a cache
that says they are there already. The rest is `tracing`.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from headstart.runtime import contract
from headstart.runtime.bundle import KeyValueInfo
from headstart.runtime.errors import CheckpointError

from .architectures import always_clamped, decoder_inputs, encoder_masks, refuse_sparse, require_inputs
from .generation_rules import alignment_heads
from .golden import encoder_states
from .rope import ONE
from .step import SlotCache, Step, during
from .tracing import (
    EXAMPLE,
    ShapeProbe,
    check_attended,
    chosen_rows,
    dtype_of,
    dynamic_shapes,
    example_inputs,
    not_through_us,
    on_the_contract,
    rename,
    to_onnx,
)

SOURCE = 7  # tokens of the traced example's source; unlike all of EXAMPLE's sizes
AUDIO_LENGTH = {"input_values": 16000, "input_features": 120}  # samples or frames of an example, where not fixed


class _Layers(list[SimpleNamespace]):
    """Cross-attention's layers as transformers reads them; knows which were read."""

    def __init__(self, states: list[Tensor]) -> None:
        super().__init__(SimpleNamespace(keys=k, values=v) for k, v in zip(states[::2], states[1::2], strict=True))
        self.read: set[int] = set()

    def __getitem__(self, index: Any) -> Any:
        self.read.add(index)
        return super().__getitem__(index)


class _Recorder:
    """Keeps the keys and values that each layer makes of the source."""

    def __init__(self) -> None:
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.states[layer_idx] = (key, value)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class TwoCaches(EncoderDecoderCache):
    """The cache object transformers sees: our own for the text, and the source's keys and values, made already or not."""

    is_compileable = False
    is_sliding = is_linear = is_dummy = ()

    def __init__(self, text: Any, source: Any, layers: int) -> None:
        self.self_attention_cache, self.cross_attention_cache = text, source
        self.is_updated = dict.fromkeys(range(layers), True)


@dataclass
class _Encoded(BaseModelOutput):
    """The encoder's output as the models around the decoders want it; Moonshine looks for a mask there."""

    attention_mask: Tensor | None = None


class EncoderGraph(torch.nn.Module):
    """Source in; encoder states, and each decoder layer's cross-attention keys and values out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, encoder_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """`source` as the encoder's main input; `encoder_mask` [B, E] bool for text. [B, E', H], then [B, G, E', D] each."""
        encoder = self.model.get_encoder()
        inputs, step = {encoder_input(self.model): source}, _first_step(source.shape[0])
        step.windowed = False
        with during(step), always_clamped(self.model):
            if encoder_mask is not None:
                require_inputs(encoder, "attention_mask")
                seen = encoder_mask[:, None, None, :].expand(-1, -1, encoder_mask.shape[1], -1)
                inputs["attention_mask"] = encoder_masks(encoder, seen)
            states = encoder(**inputs).last_hidden_state
        if not step.attended:
            raise CheckpointError(not_through_us(encoder, 0, encoder.config.num_hidden_layers))
        cross, _ = _record(self.model, states)
        return (states, *cross)


class AssistantGraph(torch.nn.Module):
    """As `EncoderGraph`, for a decoder that works behind another model's encoder: that one's states in, and out again."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        """[B, E, H] in; the same, then [B, G, E, D] each out."""
        cross, _ = _record(self.model, states)
        return (states, *cross)


def encoder_input(model: Any) -> str:
    """input_ids, input_features or input_values."""
    name: str = model.get_encoder().main_input_name
    return name


def _first_step(batch: int) -> Step:
    zeros = torch.zeros(batch, dtype=torch.long)
    return Step(zeros[:, None], zeros, [])


def _record(model: Any, states: Tensor) -> tuple[list[Tensor], ShapeProbe]:
    """(cross-attention keys and values of each layer in turn, shapes of its own caches), from one decoder step."""
    batch, length = states.shape[:2]
    recorder, probe = _Recorder(), ShapeProbe()
    step = _first_step(batch)
    step.cross_mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    caches = TwoCaches(probe, recorder, 0)
    decoder = model.get_decoder()
    with during(step), always_clamped(model):
        decoder(
            input_ids=torch.zeros(batch, 1, dtype=torch.long),
            encoder_hidden_states=states,
            past_key_values=caches,
            use_cache=True,
            **decoder_inputs(decoder, torch.ones(batch, 1, 1, 1, dtype=torch.bool)),
        )
    layers = sorted(recorder.states)
    if layers != list(range(len(layers))) or sorted(probe.shapes) != layers:
        raise CheckpointError(not_through_us(model, len(layers), max(len(layers), len(probe.shapes))))
    return [state for layer in layers for state in recorder.states[layer]], probe


class CrossDecoderGraph(torch.nn.Module):
    """As `DecoderGraph`, and the source's keys, values and mask behind the caches."""

    def __init__(self, model: Any, aux_layers: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.model = model
        self.aux_layers = aux_layers
        self.alignment_heads = _checked_alignment_heads(model)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        write_index: Tensor,
        output_rows: Tensor,
        caches: list[Tensor],
        cross: list[Tensor],
        encoder_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        step = Step(position_ids, write_index, list(caches))
        step.cross_mask = encoder_mask[:, None, None, :].expand(-1, -1, input_ids.shape[1], -1)
        step.cross_queries = [] if self.alignment_heads else None
        layers = _Layers(cross)
        states = encoder_mask[:, :, None].to(self.model.dtype)  # stands for the encoder's states, which nothing reads
        with (
            during(step),
            always_clamped(self.model),
            chosen_rows(self.model, output_rows) as captured,
            _told(self.model, attention_mask),
        ):
            out = self.model(
                decoder_input_ids=input_ids,
                encoder_outputs=_Encoded(last_hidden_state=states),
                past_key_values=TwoCaches(SlotCache(step), SimpleNamespace(layers=layers), len(layers)),
                use_cache=True,
                output_hidden_states=bool(self.aux_layers),
            )
        check_attended(self.model, step)
        if len(layers.read) != len(layers):
            raise CheckpointError(not_through_us(self.model, len(layers.read), len(layers)))
        aux = [torch.cat([out.decoder_hidden_states[i] for i in self.aux_layers], dim=-1)] if self.aux_layers else []
        return (out.logits, captured[0], *aux, *_alignment(step, self.alignment_heads), *step.caches)


def _checked_alignment_heads(model: Any) -> tuple[tuple[int, int], ...]:
    """Raises CheckpointError for a head that the decoder does not have."""
    heads, config = alignment_heads(model), model.get_decoder().config
    for layer, head in heads:
        if not (0 <= layer < config.decoder_layers and 0 <= head < config.decoder_attention_heads):
            raise CheckpointError(
                f"generation_config.json: alignment_heads names head {head} of layer {layer}; the decoder has "
                f"{config.decoder_layers} layers of {config.decoder_attention_heads} heads. Fix: this checkpoint's own file."
            )
    return heads


def _alignment(step: Step, heads: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """[B, T, n · D] queries of those heads, as one output; no output without any."""
    if step.cross_queries is None:
        return []
    queries = [step.cross_queries[layer][:, head] for layer, head in heads]
    return [torch.stack(queries, dim=2).flatten(2)]


@contextlib.contextmanager
def _told(model: Any, attention_mask: Tensor) -> Iterator[None]:
    """Hand the decoder the masks and positions of the contract, whatever the model around it makes of them."""
    decoder = model.get_decoder()

    def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | decoder_inputs(decoder, attention_mask)

    handle = decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def cache_infos(model: Any) -> tuple[tuple[KeyValueInfo, ...], tuple[KeyValueInfo, ...]]:
    """The decoder's own caches and those of the source, found by running an example through the model.

    Raises CheckpointError when its layers keep other state than that.
    """
    refuse_sparse(model)
    try:
        with on_the_contract(model, ONE), torch.no_grad():
            states = EncoderGraph(model)(*_example_source(model))
            cross, probe = _record(model, states[0])
    except CheckpointError:
        raise
    except Exception as error:  # an architecture's code may fail in any way on a cache or a mask it does not expect
        raise CheckpointError(
            f"{type(model).__name__} is not supported: it needs more of its cache or inputs than keys, values, masks and "
            f"positions ({error}). Nearest supported: an encoder-decoder such as T5, BART or Whisper."
        ) from error
    names = [(contract.key_name(layer), contract.value_name(layer)) for layer in range(len(probe.shapes))]
    own = [KeyValueInfo(*pair, *probe.shapes[layer], dtype_of(model)) for layer, pair in enumerate(names)]
    pairs = list(zip(cross[::2], cross[1::2], strict=True))
    source = [
        KeyValueInfo(
            contract.cross_key_name(layer),
            contract.cross_value_name(layer),
            key.shape[1],
            key.shape[3],
            value.shape[3],
            dtype_of(model),
        )
        for layer, (key, value) in enumerate(pairs)
    ]
    return tuple(own), tuple(source)


def trace_encoder(model: Any, cross_caches: tuple[KeyValueInfo, ...]) -> Any:
    """The canonical encoder as an onnx_ir Model. Raises CheckpointError when the model does not fit the contract."""
    source = _example_source(model)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("source")
    axes: list[Any] = [{0: batch, 1: length}, {0: batch, 1: length}][: len(source)]
    if len(source) == 1:
        axes = [{0: batch} | _dynamic_audio(model)]
    program = to_onnx(EncoderGraph(model), source, tuple(axes))
    names = [encoder_input(model), contract.ENCODER_MASK][: len(source)]
    rename(program.model.graph.inputs, names)
    rename(program.model.graph.outputs, [contract.ENCODER_HIDDEN, *_names(cross_caches)])
    return program.model


def trace_assistant(model: Any, cross_caches: tuple[KeyValueInfo, ...]) -> Any:
    """The graph that stands in the encoder's place, as an onnx_ir Model; raises as `trace_encoder`."""
    source = _example_source(model)[0]
    readable = source.float() if source.is_floating_point() else source  # numpy has no bfloat16
    width = encoder_states(model, readable.numpy()).shape[-1]
    states = torch.zeros(EXAMPLE["batch"], SOURCE, width, dtype=model.dtype)
    axes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("source")},)
    program = to_onnx(AssistantGraph(model), (states,), axes)
    rename(program.model.graph.inputs, [contract.ENCODER_STATES])
    rename(program.model.graph.outputs, [contract.ENCODER_HIDDEN, *_names(cross_caches)])
    return program.model


def encoder_sha256(model: Any) -> str:
    """Of the encoder's weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.get_encoder().state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def trace_decoder(
    model: Any, caches: tuple[KeyValueInfo, ...], cross_caches: tuple[KeyValueInfo, ...], aux_layers: tuple[int, ...] = ()
) -> Any:
    """The canonical decoder as an onnx_ir Model. Raises CheckpointError when the model does not fit the contract."""
    batch = EXAMPLE["batch"]
    sizes = [(info.kv_heads, size) for info in cross_caches for size in (info.key_size, info.value_size)]
    cross = [torch.zeros(batch, heads, SOURCE, size, dtype=model.dtype) for heads, size in sizes]
    inputs = (*example_inputs(model, caches), cross, torch.ones(batch, SOURCE, dtype=torch.bool))
    axes, length = dynamic_shapes(len(caches)), torch.export.Dim("source")
    rows = axes[0][0]
    axes = (*axes, [{0: rows, 2: length}] * len(cross), {0: rows, 1: length})
    program = to_onnx(CrossDecoderGraph(model, aux_layers), inputs, axes)
    own, source = _names(caches), _names(cross_caches)
    rename(program.model.graph.inputs, [*contract.STEP_INPUTS, *own, *source, contract.ENCODER_MASK])
    more = [contract.AUX_HIDDEN] * bool(aux_layers) + [contract.ALIGNMENT] * bool(alignment_heads(model))
    rename(program.model.graph.outputs, [contract.LOGITS, contract.HIDDEN, *more, *map(contract.updated, own)])
    return program.model


def _names(infos: tuple[KeyValueInfo, ...]) -> list[str]:
    return [name for info in infos for name in (info.key_name, info.value_name)]


def _example_source(model: Any) -> tuple[Tensor, ...]:
    """The encoder's inputs: tokens and their mask, or audio features."""
    batch, name = EXAMPLE["batch"], encoder_input(model)
    if name == "input_ids":
        return torch.full((batch, SOURCE), 3), torch.ones(batch, SOURCE, dtype=torch.bool)
    return (torch.zeros(batch, *feature_shape(model, AUDIO_LENGTH[name]), dtype=model.dtype),)


def feature_shape(model: Any, length: int) -> tuple[int, ...]:
    """The shape of one source's features, of `length` frames or samples where the model does not fix their number."""
    config = model.config
    if encoder_input(model) == "input_values":
        return (length,)
    if hasattr(config, "num_mel_bins"):  # Whisper: windows of one length
        return config.num_mel_bins, 2 * config.max_source_positions
    return length, config.input_feat_per_channel * config.input_channels


@dataclass(frozen=True)
class Limits:
    """What the encoder reads ("text" or "audio"), and the longest source and text; 0 is no limit, or none stated."""

    kind: str
    source: int
    text: int


def limits(model: Any) -> Limits:
    """As the configuration states them."""
    decoder = model.get_decoder().config
    positions = getattr(decoder, "max_target_positions", None) or getattr(decoder, "max_position_embeddings", None) or 0
    if encoder_input(model) == "input_ids":
        encoder = model.get_encoder().config.get_text_config()
        return Limits("text", getattr(encoder, "max_position_embeddings", None) or 0, positions)
    frames = getattr(model.config, "max_source_positions", None) or 0
    if hasattr(model.config, "num_mel_bins"):
        frames *= 2  # the second convolution halves them
    return Limits("audio", frames, positions)


def _dynamic_audio(model: Any) -> dict[int, Any]:
    return {} if hasattr(model.config, "num_mel_bins") else {1: torch.export.Dim.DYNAMIC}

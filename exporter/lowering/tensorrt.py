"""The recipe for TensorRT, classic and RTX: which passes, in which order. The graph stays one of standard operators.

What builders need beyond the canonical graph: one stated type for every value, a cache of one size, and masks and heads in
the form their fused attention takes. DequantizeLinear before a MatMul stays: it is how TensorRT expresses 8 and 4 bits.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from headstart.exporter.passes.additive_mask import add_masks
from headstart.exporter.passes.attention_scale import avoid_unit_scale
from headstart.exporter.passes.best_tokens import add_best_tokens
from headstart.exporter.passes.decomposed_attention import decompose_attention
from headstart.exporter.passes.dequantized_embedding import dequantize_tables
from headstart.exporter.passes.fixed_sizes import fix_sizes
from headstart.exporter.passes.gemm import split_gemms
from headstart.exporter.passes.grouped_heads import fold_grouped_heads
from headstart.exporter.passes.half import layers_beyond, to_half
from headstart.exporter.passes.linear import linears
from headstart.exporter.passes.rms_norm import fuse_rms_norms
from headstart.exporter.passes.row_mask import mask_from_rows
from headstart.exporter.passes.scatter_elements import scatter_elements
from headstart.exporter.passes.values import dtype_of, tensor_of
from headstart.runtime.errors import EngineError

from .attention import decomposed_attention

DECOMPOSED_OPSET = 21  # the last with block-wise DequantizeLinear that TensorRT 10.3 knows
HALF_ONLY = ("Attention", "TensorScatter")
WEIGHT_TYPES = {"INT4": "int4", "INT8": "int8", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "FLOAT": "float32"}


@dataclass(frozen=True)
class Lowered:
    """A lowered graph, what each pass left in it, its weights' bytes by type, and the layers that are not as the others: linear
    ones that stay float32, attention that is decomposed."""

    model: ir.Model
    passes: dict[str, int]
    weight_bytes: dict[str, int]
    float32_layers: tuple[str, ...] = ()
    decomposed_attention: tuple[str, ...] = ()


def lower(
    model: ir.Model, precision: str, sizes: Mapping[str, int], native: bool = True, overflowing: Collection[str] = ()
) -> Lowered:
    """Lower a decoder, an encoder or a head.

    Args:
        precision: float16 or bfloat16.
        sizes: axes with one size (batch, slots, …); the others stay open for the profiles.
        native: the builder has layers for attention, cache updates and norms; else they are decomposed, in the operators of
            ONNX opset 21.
        overflowing: names of values that float16 cannot hold, see `exporter.overflow`.

    Raises EngineError where such a value is one that only half precision can carry: attention's, or one that leaves the graph.
    """
    common.ShapeInferencePass(strict_mode=False)(model)  # quantizing leaves values whose type nobody stated
    model, _ = split_gemms(model)
    if native:
        model, _ = fuse_rms_norms(model)
    model, _ = dequantize_tables(model)
    model, _ = scatter_elements(model, floats=not native)
    common.ShapeInferencePass(strict_mode=False)(model)
    float32_layers: tuple[str, ...] = ()
    if _computes_in_float32(model):
        beyond = set(overflowing) if precision == "float16" else set()
        check_carried(model, beyond)
        float32_layers = _linear_names(model, beyond)
        model, _ = to_half(model, precision, beyond)
    model, _ = mask_from_rows(model, sizes.get("slots", 0))
    model, _ = add_masks(model)
    model, _ = avoid_unit_scale(model)
    model, _ = add_best_tokens(model)
    grouped = fold_grouped_heads(model)[1]
    if not native:
        model, _ = decompose_attention(model)
        model.graph.opset_imports[""] = DECOMPOSED_OPSET
    model, _ = fix_sizes(model, sizes)
    parts = decomposed_attention(model)
    return Lowered(model, _counts(model, grouped, len(parts)), weight_bytes(model), float32_layers, parts)


def lower_frontend(model: ir.Model, sizes: Mapping[str, int], native: bool = True) -> Lowered:
    """Of recordings: it stays in float32, for its powers span more than half precision does."""
    if not native:
        model.graph.opset_imports[""] = DECOMPOSED_OPSET
    model, _ = fix_sizes(model, sizes)
    return Lowered(model, {}, weight_bytes(model))


def check_carried(model: ir.Model, beyond: Collection[str]) -> None:
    """Raises EngineError where a value beyond float16 is one of attention's, or leaves the graph."""
    stuck = [node.outputs[0].name for node in layers_beyond(model, beyond) if node.op_type in HALF_ONLY]
    stuck += [value.name for value in model.graph.outputs if value.name in beyond]
    if stuck:
        raise EngineError(
            f"{stuck[0]} involves values beyond float16's 65504, and engines compute attention and pass states on in "
            "half precision only. Fix: --precision bfloat16."
        )


def _linear_names(model: ir.Model, beyond: Collection[str]) -> tuple[str, ...]:
    """The checkpoint's names of the linear layers that make or read such values."""
    nodes = {id(node) for node in layers_beyond(model, beyond)}
    return tuple(linear.name for linear in linears(model) if id(linear.node) in nodes)


def _computes_in_float32(model: ir.Model) -> bool:
    """Whether the activations are float32: the types of a bundle exported in half precision are final."""
    return any(value.dtype == ir.DataType.FLOAT for value in (*model.graph.inputs, *model.graph.outputs))


def _counts(model: ir.Model, grouped: bool, decomposed_layers: int) -> dict[str, int]:
    kinds = [node.op_type for node in model.graph]
    return {
        "fused_norms": kinds.count("RMSNormalization") + kinds.count("LayerNormalization"),
        "quantized_weights": kinds.count("DequantizeLinear"),
        "cache_updates": kinds.count("TensorScatter"),
        "attention_layers": kinds.count("Attention"),
        "decomposed_attention_layers": decomposed_layers,
        "folded_heads": int(grouped),
    }


def weight_bytes(model: ir.Model) -> dict[str, int]:
    """Bytes of the constants by type; int4 is two to a byte."""
    total: dict[str, int] = {}
    for value in model.graph.initializers.values():
        kind = WEIGHT_TYPES.get(dtype_of(value).name)
        if kind is not None:
            total[kind] = total.get(kind, 0) + tensor_of(value).nbytes
    return total

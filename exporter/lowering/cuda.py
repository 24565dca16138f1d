"""The recipe for ONNX Runtime's CUDA provider: which passes, in which order.

Half precision; caches that TensorScatter writes in place; masks that are added and heads that are not grouped, which is what
its memory-efficient attention takes without copying keys and values; quantized weights in MatMulNBits. One form for any batch.
"""

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from headstart.exporter.lowering.tensorrt import check_carried
from headstart.exporter.passes.additive_mask import add_masks
from headstart.exporter.passes.argmax import add_argmax
from headstart.exporter.passes.gemm import split_gemms
from headstart.exporter.passes.grouped_heads import fold_grouped_heads
from headstart.exporter.passes.half import to_half
from headstart.exporter.passes.matmul_nbits import pack_weights
from headstart.exporter.passes.packed_linears import pack_linears
from headstart.exporter.passes.rms_norm import fuse_rms_norms

PRECISIONS = ("float16", "bfloat16")


@dataclass(frozen=True)
class Lowered:
    """A lowered graph, and how many nodes of each kind it holds."""

    model: ir.Model
    passes: dict[str, int]


def lower(model: ir.Model, precision: str, overflowing: Collection[str] = ()) -> Lowered:
    """Lower a decoder, an encoder or a head.

    Args:
        precision: float16 or bfloat16; float32 leaves the types as they are.
        overflowing: names of values that float16 cannot hold, see `exporter.overflow`.

    Raises EngineError where such a value is one that only half precision can carry: attention's, or one that leaves the graph.
    """
    common.ShapeInferencePass(strict_mode=False)(model)  # quantizing leaves values whose type nobody stated
    beyond = set(overflowing) if precision == "float16" else set()
    passes = (split_gemms, fuse_rms_norms) if beyond else (split_gemms, fuse_rms_norms, pack_linears)
    for lowering in passes:  # packing renames what layers make
        model, _ = lowering(model)
    common.ShapeInferencePass(strict_mode=False)(model)
    model, _ = pack_weights(model)
    if precision != "float32" and _computes_in_float32(model):
        check_carried(model, beyond)
        model, _ = to_half(model, precision, beyond)
    model, _ = add_masks(model)
    model, grouped = fold_grouped_heads(model)
    model, _ = add_argmax(model)
    common.ShapeInferencePass(strict_mode=False)(model)
    return Lowered(model, _counts(model, grouped))


def _computes_in_float32(model: ir.Model) -> bool:
    """Whether the activations are float32: the types of a bundle exported in half precision are final."""
    return any(value.dtype == ir.DataType.FLOAT for value in (*model.graph.inputs, *model.graph.outputs))


def _counts(model: ir.Model, grouped: bool) -> dict[str, int]:
    kinds = [node.op_type for node in model.graph]
    return {
        "fused_norms": kinds.count("RMSNormalization") + kinds.count("LayerNormalization"),
        "quantized_linears": kinds.count("MatMulNBits"),
        "cache_updates": kinds.count("TensorScatter"),
        "attention_layers": kinds.count("Attention"),
        "folded_heads": int(grouped),
    }

"""The recipe for ONNX Runtime's CPU provider: which passes, in which order, and two forms of the decoder.

One sequence decodes through GroupQueryAttention; a batch, which that operator refuses, through the portable attention.
Everything else is the same, and both forms read one file of weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from headstart.exporter.passes.gemm import split_gemms
from headstart.exporter.passes.grouped_query_attention import fuse_attention, fused_layers
from headstart.exporter.passes.linear import linears
from headstart.exporter.passes.normalization import fuse_normalization
from headstart.exporter.passes.packed_linears import pack_linears
from headstart.exporter.passes.per_row_int8 import ZERO_POINTS, lower_linears
from headstart.exporter.passes.surgery import MICROSOFT

Pass = Callable[[Any], tuple[Any, bool]]


@dataclass
class Lowered:
    """The two forms of a lowered decoder, and how many nodes of each kind they hold."""

    single: Any
    batch: Any
    passes: dict[str, int] = field(default_factory=dict)


def lower_decoder(model: Any, positions: int, activations: str) -> Lowered:
    """Lower a canonical decoder. `positions`: the longest text; `activations`: uint8 or int8, see `fastest_exact`."""
    quantized = sum(linear.quantized for linear in linears(model))
    for lowering in _common(activations):
        model, _ = lowering(model)
    batch = model.clone()
    single, _ = fuse_attention(model, positions)
    counts = {
        "fused_norms": sum(node.op_type.endswith("LayerNormalization") for node in single.graph),
        "quantized_linears": quantized,
        "integer_products": sum(node.op_type == "MatMulIntegerToFloat" for node in single.graph),
        "fused_attention_layers": fused_layers(single),
    }
    return Lowered(single, batch, counts)


def lower_graph(model: Any, activations: str) -> Any:
    """Lower a graph that keeps no cache: a draft head's, or an encoder's."""
    for lowering in _common(activations):
        model, _ = lowering(model)
    return model


def _common(activations: str) -> tuple[Pass, ...]:
    return split_gemms, fuse_normalization, pack_linears, lambda model: lower_linears(model, activations)


def probe_model(activations: str) -> Any:
    """A graph without inputs whose one output says whether this CPU multiplies `activations` by int8 exactly.

    Some instruction sets add products of neighbours in 16 bits, which overflows: uint8 × int8 is then wrong for large
    values, and silently so.
    """
    largest = np.iinfo(activations).max
    inputs = np.full((3, 256), largest, activations)
    weight = np.full((256, 32), 127, np.int8)
    expected = np.full((3, 32), 127 * 256 * (int(largest) - ZERO_POINTS[activations]), np.float32)
    values = [
        _initializer("inputs", inputs),
        _initializer("weight", weight),
        _initializer("one", np.float32(1)),
        _initializer("scales", np.ones(32, np.float32)),
        _initializer("zero_point", np.array(ZERO_POINTS[activations], activations)),
        _initializer("expected", expected),
    ]
    product = ir.node("MatMulIntegerToFloat", values[:5], domain=MICROSOFT)
    difference = ir.node("Sub", [product.outputs[0], values[5]])
    distance = ir.node("Abs", difference.outputs)
    worst = ir.node("ReduceMax", distance.outputs, attributes={"keepdims": 0})
    nodes, out = [product, difference, distance, worst], worst.outputs[0]
    out.name, out.dtype, out.shape = "error", ir.DataType.FLOAT, ir.Shape(())
    imports = {"": 21, MICROSOFT: 1}
    return ir.Model(ir.Graph([], [out], nodes=nodes, initializers=values, opset_imports=imports, name="probe"), ir_version=10)


def _initializer(name: str, array: Any) -> Any:
    tensor = ir.tensor(np.asarray(array), name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)

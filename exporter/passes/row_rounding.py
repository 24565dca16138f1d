"""The rounding of `per_row_int8`, written out in float32: what a graph with integer products computes, on any CPU.

A canonical graph with quantized weights says nothing of activations. The engine rounds those of each row to 8 bits, which on a
model with a few large channels moves logits by much more than a defect would. With the same rounding on both sides, lowered
and canonical graphs differ by the order of summation alone, whatever the weights are.
"""

import numpy as np
import onnx_ir as ir

from .linear import Linear, linears
from .per_row_int8 import LARGEST, has_fixed_scale, per_channel
from .surgery import Writer, clean
from .values import shape_of


def round_rows(model: ir.Model) -> tuple[ir.Model, bool]:
    """Round what every quantized linear layer reads, and widen int4 weights to int8 per channel. Idempotent it is not."""
    rounded: dict[int, ir.Value] = {}
    quantized = [linear for linear in linears(model) if linear.quantized]
    for linear in quantized:
        write, source = Writer(model, linear.node), linear.source
        if not has_fixed_scale(source):
            if id(source) not in rounded:
                rounded[id(source)] = _rounded(write, source)
            linear.node.replace_input_with(0, rounded[id(source)])
        if _is_widened(linear):
            values, scales = per_channel(linear)
            linear.node.replace_input_with(1, write.constant(f"{linear.name}.widened", values.astype(np.float32) * scales))
    if quantized:
        clean(model)
    return model, bool(quantized)


def _is_widened(linear: Linear) -> bool:
    return linear.weight.dtype != ir.DataType.INT8 or len(shape_of(linear.required_scales)) != 1


def _rounded(write: Writer, source: ir.Value) -> ir.Value:
    """In the very operations of the lowered graph, so that what lies between two integers falls on the same side."""
    largest = write.node("ReduceMax", [write.node("Abs", [source]), write.ints([-1])], keepdims=1)
    step, zero = write.constant("one_127th", np.float32(1 / LARGEST)), write.constant("zero_point.int8", np.int8(0))
    integers = write.node("QuantizeLinear", [write.node("Div", [source, largest]), step, zero])
    return write.node("Mul", [write.node("DequantizeLinear", [integers, step, zero]), largest])

"""Quantized linear layers multiply whole numbers: int8 weights per output channel, int8 activations per row.

Every row of the activations gets its own scale, so a row's result does not depend on the rows beside it, and speculative
decoding stays equal to plain decoding (one scale per tensor, as in dynamic quantization, is not lossless). MatMulInteger
costs hardly more for eight rows than for one. int4 weights in groups are widened to int8 per channel: their products are
as exact, and no kernel multiplies them as fast over many rows.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .linear import Linear, linears
from .surgery import MICROSOFT, Writer, clean, put_in_place

LARGEST = 127
ZERO_POINTS = {"uint8": 128, "int8": 0}


def lower_linears(model: Any, activations: str) -> tuple[Any, bool]:
    """Rewrite every quantized linear layer. `activations` is the type this CPU multiplies exactly and fast: uint8 or int8."""
    rows: dict[int, tuple[Any, Any]] = {}
    changed = False
    for linear in linears(model):
        if linear.quantized:
            _rewrite(model, linear, activations, rows)
            changed = True
    if changed:
        clean(model)
    return model, changed


def _rewrite(model: Any, linear: Linear, activations: str, rows: dict[int, tuple[Any, Any]]) -> None:
    write = Writer(model, linear.node)
    source, result = linear.node.inputs[0], linear.node.outputs[0]
    if id(source) not in rows:  # layers that read the same activations share their quantization
        rows[id(source)] = _quantize_rows(write, source, activations)
    quantized, scales = rows[id(source)]
    values, channel_scales = per_channel(linear)
    weight = write.constant(f"{linear.name}.int8", np.ascontiguousarray(values))
    channel = write.constant(f"{linear.name}.channel_scale", channel_scales)
    one, zero_point = _quantization_constants(write, activations)
    inputs = [quantized, weight, one, channel, zero_point]
    product = write.node("MatMulIntegerToFloat", inputs, MICROSOFT)
    put_in_place(result, write.node("Mul", [product, scales]))


def _quantize_rows(write: Writer, source: Any, activations: str) -> tuple[Any, Any]:
    """(whole numbers [B, T, K], scales [B, T, 1]). A row of zeros has scale 0, and 0 · anything finite is 0 again."""
    axes, reciprocal = write.ints([-1]), write.constant("one_127th", np.float32(1 / LARGEST))
    largest = write.node("ReduceMax", [write.node("Abs", [source]), axes], keepdims=1)
    scales = write.node("Mul", [largest, reciprocal])
    one, zero_point = _quantization_constants(write, activations)
    return write.node("QuantizeLinear", [write.node("Div", [source, scales]), one, zero_point]), scales


def _quantization_constants(write: Writer, activations: str) -> tuple[Any, Any]:
    zero_point = np.array(ZERO_POINTS[activations], activations)
    return write.constant("one", np.float32(1)), write.constant(f"zero_point.{activations}", zero_point)


def per_channel(linear: Linear) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """([K, N] int8, [N] float32) of a quantized layer: as stored when it has one scale per channel, else widened."""
    if linear.weight.dtype == ir.DataType.INT8 and len(linear.scales.shape) == 1:
        return linear.values(), np.asarray(linear.scales.const_value.numpy(), np.float32)
    weight = linear.dequantized()
    scales = np.abs(weight).max(axis=0) / LARGEST
    safe = np.where(scales > 0, scales, 1).astype(np.float32)
    return np.rint(weight / safe).astype(np.int8), safe

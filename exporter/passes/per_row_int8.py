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
    quantized, largest = rows[id(source)]
    values, channel_scales = per_channel(linear)
    weight = write.constant(f"{linear.name}.int8", np.ascontiguousarray(values))
    channel = write.constant(f"{linear.name}.channel_scale", channel_scales / LARGEST)
    zero_point = _zero_point(write, activations)
    inputs = [quantized, weight, write.constant("one", np.float32(1)), channel, zero_point]
    product = write.node("MatMulIntegerToFloat", inputs, MICROSOFT)
    put_in_place(result, write.node("Mul", [product, largest]))


def _quantize_rows(write: Writer, source: Any, activations: str) -> tuple[Any, Any]:
    """(whole numbers [B, T, K], largest magnitudes [B, T, 1]): each row divided by its largest, in steps of 1/127.

    The 127 is made up for in the weight's scales. A row of zeros is 0/0, and whatever that becomes is multiplied by 0 again.
    """
    largest = write.node("ReduceMax", [write.node("Abs", [source]), write.ints([-1])], keepdims=1)
    step = write.constant("one_127th", np.float32(1 / LARGEST))
    inputs = [write.node("Div", [source, largest]), step, _zero_point(write, activations)]
    return write.node("QuantizeLinear", inputs), largest


def _zero_point(write: Writer, activations: str) -> Any:
    return write.constant(f"zero_point.{activations}", np.array(ZERO_POINTS[activations], activations))


def per_channel(linear: Linear) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """([K, N] int8, [N] float32) of a quantized layer: as stored when it has one scale per channel, else widened."""
    if linear.weight.dtype == ir.DataType.INT8 and len(linear.scales.shape) == 1:
        return linear.values(), np.asarray(linear.scales.const_value.numpy(), np.float32)
    weight = linear.dequantized()
    scales = np.abs(weight).max(axis=0) / LARGEST
    safe = np.where(scales > 0, scales, 1).astype(np.float32)
    return np.rint(weight / safe).astype(np.int8), safe

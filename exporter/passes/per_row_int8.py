"""Quantized linear layers multiply integers: int8 weights per output channel, int8 activations per row.

Every row of the activations gets its own scale, so a row's result does not depend on the other rows, and speculative
decoding stays equal to plain decoding (one scale per tensor, as in dynamic quantization, is not lossless). MatMulInteger
costs hardly more for eight rows than for one. int4 weights in groups are widened to int8 per channel: their products are
as exact, and no kernel multiplies them as fast over many rows. Where the canonical graph gives activations a fixed scale of
their own, that is taken: it depends on no row at all.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .linear import Linear, linears
from .surgery import MICROSOFT, Writer, clean, constant_of, producer, replace_value
from .values import array_of, operand, shape_of

LARGEST = 127
ZERO_POINTS = {"uint8": 128, "int8": 0}
Integer = Literal["uint8", "int8"]


@dataclass(frozen=True)
class Product:
    """The types a kernel multiplies; uint8 is int8 shifted by its zero point, 128, so the values are the same in both.

    Attributes:
        activations: of the rows.
        weights: of the matrix.
    """

    activations: Integer
    weights: Integer

    def __str__(self) -> str:
        return f"{self.activations} by {self.weights}"


# int8 by uint8 has no kernel in ONNX Runtime.
PRODUCTS = (Product("uint8", "int8"), Product("int8", "int8"), Product("uint8", "uint8"))


def lower_linears(model: ir.Model, product: Product) -> tuple[ir.Model, bool]:
    """Rewrite every quantized linear layer. `product`: the types this CPU multiplies exactly and fast, see `fastest_exact`."""
    rounded: dict[int, _Rounded] = {}
    changed = False
    for linear in linears(model):
        if linear.quantized:
            _rewrite(model, linear, product, rounded)
            changed = True
    if changed:
        clean(model)
    return model, changed


@dataclass(frozen=True)
class _Rounded:
    """Activations as integers: x ≈ values · step · row, where row is None for a scale that is the same for all rows."""

    values: ir.Value  # [B, T, K] uint8 or int8
    step: ir.Value  # float
    row: ir.Value | None  # [B, T, 1] float


def _rewrite(model: ir.Model, linear: Linear, product: Product, rounded: dict[int, _Rounded]) -> None:
    write = Writer(model, linear.node)
    source, result = linear.source, linear.node.outputs[0]
    if id(source) not in rounded:  # layers that read the same activations share their rounding
        kind = product.activations
        rounded[id(source)] = _by_fixed_scale(write, source, kind) or _by_row(write, source, kind)
    left = rounded[id(source)]
    values, channel_scales = per_channel(linear)
    weight = write.constant(f"{linear.name}.{product.weights}", np.ascontiguousarray(shifted(values, product.weights)))
    channel = write.constant(f"{linear.name}.channel_scale", channel_scales)
    inputs = [left.values, weight, left.step, channel, _zero_point(write, product.activations)]
    if ZERO_POINTS[product.weights]:
        inputs.append(_zero_point(write, product.weights))
    floats = write.node("MatMulIntegerToFloat", inputs, MICROSOFT)
    replace_value(result, floats if left.row is None else write.node("Mul", [floats, left.row]))


def _by_fixed_scale(write: Writer, source: ir.Value, kind: Integer) -> _Rounded | None:
    """The rounding that the canonical graph prescribes, when it does."""
    quantize = _fixed_rounding(source)
    if quantize is None:
        return None
    floats, step = operand(quantize, 0), operand(quantize, 1)
    return _Rounded(write.node("QuantizeLinear", [floats, step, _zero_point(write, kind)]), step, None)


def has_fixed_scale(source: ir.Value) -> bool:
    """Whether the canonical graph rounds these activations itself."""
    return _fixed_rounding(source) is not None


def _fixed_rounding(source: ir.Value) -> ir.Node | None:
    """The QuantizeLinear of one constant scale that a value went through."""
    dequantize = producer(source, "DequantizeLinear")
    quantize = producer(dequantize.inputs[0], "QuantizeLinear") if dequantize is not None else None
    if quantize is None or constant_of(quantize.inputs[1]) is None or len(shape_of(operand(quantize, 1))):
        return None
    return quantize


def _by_row(write: Writer, source: ir.Value, kind: Integer) -> _Rounded:
    """Each row divided by its largest magnitude, in steps of 1/127.

    A row of zeros is 0/0, and whatever that becomes is multiplied by 0 again.
    """
    largest = write.node("ReduceMax", [write.node("Abs", [source]), write.ints([-1])], keepdims=1)
    step = write.constant("one_127th", np.float32(1 / LARGEST))
    values = write.node("QuantizeLinear", [write.node("Div", [source, largest]), step, _zero_point(write, kind)])
    return _Rounded(values, step, largest)


def _zero_point(write: Writer, kind: Integer) -> ir.Value:
    return write.constant(f"zero_point.{kind}", np.array(ZERO_POINTS[kind], kind))


def shifted(values: NDArray[np.int8], kind: Integer) -> NDArray[np.int8] | NDArray[np.uint8]:
    """The same values in another type, by its zero point."""
    return values if kind == "int8" else (values.view(np.uint8) ^ np.uint8(ZERO_POINTS[kind]))


def per_channel(linear: Linear) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """([K, N] int8, [N] float32) of a quantized layer: as stored when it has one scale per channel, else widened."""
    if linear.weight.dtype == ir.DataType.INT8 and len(shape_of(linear.required_scales)) == 1:
        return linear.values(), np.asarray(array_of(linear.required_scales), np.float32)
    weight = linear.dequantized()
    scales = np.abs(weight).max(axis=0) / LARGEST
    safe = np.where(scales > 0, scales, 1).astype(np.float32)
    return np.rint(weight / safe).astype(np.int8), safe

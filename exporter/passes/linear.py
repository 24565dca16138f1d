"""Linear layers of a graph, whatever form their weight takes: plain, transposed, or after a DequantizeLinear."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .rotation import is_rotation
from .surgery import constant_of, producer
from .values import array_of, name_of, operand, shape_of, size_of, stated


@dataclass(frozen=True)
class Linear:
    """A MatMul of activations with a constant matrix.

    Attributes:
        node: the MatMul.
        weight: the initializer that holds the values: float, or int8/int4 when quantized.
        scales: the initializer of the scales, when quantized.
        transposed: the initializer is stored [N, K] (as a tied embedding is), else [K, N].
    """

    node: ir.Node
    weight: ir.Value
    scales: ir.Value | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """The checkpoint's name of the weight."""
        return name_of(self.weight).removesuffix(".quantized")

    @property
    def source(self) -> ir.Value:
        """The activations that the layer reads."""
        return operand(self.node, 0)

    @property
    def quantized(self) -> bool:
        return self.scales is not None

    @property
    def required_scales(self) -> ir.Value:
        """The scales of a layer that is known to be quantized."""
        return stated(self.scales, f"the scales of {self.name}")

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N): inputs and outputs."""
        first, second = size_of(self.weight, 0), size_of(self.weight, 1)
        return (second, first) if self.transposed else (first, second)

    def values(self) -> NDArray[Any]:
        """[K, N] as stored: floats, or integers when quantized."""
        array = array_of(self.weight)
        if self.quantized:
            array = array.astype(np.int8)
        return array.T if self.transposed else array

    def dequantized(self) -> NDArray[np.float32]:
        """[K, N] float32."""
        values: NDArray[np.float32] = self.values().astype(np.float32)
        if self.quantized:
            values *= self._scale_of_each()
        return values

    def _scale_of_each(self) -> NDArray[np.float32]:
        """[N] or [K, N]."""
        scales: NDArray[np.float32] = np.asarray(array_of(self.required_scales), np.float32)
        if scales.ndim == 1:
            return scales
        scales = scales.T if self.transposed else scales
        return np.repeat(scales, self.shape[0] // scales.shape[0], axis=0)


def linears(model: ir.Model) -> Iterator[Linear]:
    """Every linear layer, in the order of computation."""
    for node in list(model.graph):
        if node.op_type == "MatMul" and node.domain == "" and (linear := _linear(node)) is not None:
            yield linear


def _linear(node: ir.Node) -> Linear | None:
    value = operand(node, 1)
    if is_rotation(value):
        return None
    transpose = producer(value, "Transpose")
    if transpose is not None:
        value = operand(transpose, 0)
    dequantize = producer(value, "DequantizeLinear")
    weight, scales = (value, None) if dequantize is None else (operand(dequantize, 0), operand(dequantize, 1))
    if not weight.is_initializer() or weight.const_value is None or len(shape_of(weight)) != 2:
        return None
    return Linear(node, weight, scales, transpose is not None)


def is_lm_head(linear: Linear, vocab_size: int) -> bool:
    """It projects onto the vocabulary."""
    return linear.shape[1] == vocab_size


def embedding_tables(model: ir.Model, vocab_size: int) -> Iterator[tuple[ir.Node, ir.Value]]:
    """(Gather node, [V, H] float initializer) of the token embedding."""
    for node in list(model.graph):
        if node.op_type != "Gather" or constant_of(node.inputs[0]) is None:
            continue
        table = operand(node, 0)
        if len(shape_of(table)) == 2 and shape_of(table)[0] == vocab_size:
            yield node, table

"""Linear layers of a graph, whatever form their weight takes: plain, transposed, or behind a DequantizeLinear."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .surgery import constant_of, producer


@dataclass(frozen=True)
class Linear:
    """A MatMul of activations with a constant matrix.

    Attributes:
        node: the MatMul.
        weight: the initializer that holds the values: float, or int8/int4 when quantized.
        scales: the initializer of the scales, when quantized.
        transposed: the initializer is stored [N, K] (as a tied embedding is), else [K, N].
    """

    node: Any
    weight: Any
    scales: Any = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """The checkpoint's name of the weight."""
        name: str = self.weight.name.removesuffix(".quantized")
        return name

    @property
    def quantized(self) -> bool:
        return self.scales is not None

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N): inputs and outputs."""
        first, second = self.weight.shape
        return (second, first) if self.transposed else (first, second)

    def values(self) -> NDArray[Any]:
        """[K, N] as stored: floats, or whole numbers when quantized."""
        array: NDArray[Any] = self.weight.const_value.numpy()
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
        scales: NDArray[np.float32] = np.asarray(self.scales.const_value.numpy(), np.float32)
        if scales.ndim == 1:
            return scales
        scales = scales.T if self.transposed else scales
        return np.repeat(scales, self.shape[0] // scales.shape[0], axis=0)


def linears(model: Any) -> Iterator[Linear]:
    """Every linear layer, in the order of computation."""
    for node in list(model.graph):
        if node.op_type == "MatMul" and node.domain == "" and (linear := _linear(node)) is not None:
            yield linear


def _linear(node: Any) -> Linear | None:
    value = node.inputs[1]
    transpose = producer(value, "Transpose")
    if transpose is not None:
        value = transpose.inputs[0]
    dequantize = producer(value, "DequantizeLinear")
    weight, scales = (dequantize.inputs[0], dequantize.inputs[1]) if dequantize is not None else (value, None)
    if not weight.is_initializer() or weight.const_value is None or len(weight.shape) != 2:
        return None
    return Linear(node, weight, scales, transpose is not None)


def is_lm_head(linear: Linear, vocab_size: int) -> bool:
    """It projects onto the vocabulary."""
    return linear.shape[1] == vocab_size


def embedding_tables(model: Any, vocab_size: int) -> Iterator[tuple[Any, Any]]:
    """(Gather node, [V, H] float initializer) of the token embedding."""
    for node in list(model.graph):
        if node.op_type != "Gather" or constant_of(node.inputs[0]) is None:
            continue
        table = node.inputs[0]
        if len(table.shape) == 2 and table.shape[0] == vocab_size:
            yield node, table

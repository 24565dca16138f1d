"""Activations and caches in 8 bits with fixed scales: QuantizeLinear and DequantizeLinear where TensorRT expects them.

Scales come from calibration data and are part of the graph, so a row's result still does not depend on other rows.
Symmetric, as all of Headstart's quantization.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.exporter.passes.linear import Linear
from headstart.exporter.passes.surgery import Writer, producer
from headstart.exporter.passes.values import name_of
from headstart.runtime import contract
from headstart.runtime.bundle import KeyValueInfo

from .feeds import Feeds
from .observers import activations

LARGEST = 127
SMALLEST = 1e-8  # range of values that are always zero


def quantize_inputs(model: Any, layers: Sequence[Linear], feeds: Feeds) -> None:
    """Let each of `layers` read its input rounded to int8, in steps of 1/127 of the largest magnitude in the data."""
    sources: dict[str, Linear] = {}
    for linear in layers:
        sources.setdefault(name_of(linear.source), linear)  # the first reader: nodes are in the order of computation
    largest = dict.fromkeys(sources, 0.0)
    for arrays in activations(model, list(sources), feeds):
        for name, values in zip(sources, arrays, strict=True):
            largest[name] = max(largest[name], float(np.abs(values).max()))
    rounded = {name: _rounded_input(model, linear, largest[name]) for name, linear in sources.items()}
    for linear in layers:
        linear.node.replace_input_with(0, rounded[name_of(linear.source)])


def _rounded_input(model: Any, linear: Linear, largest: float) -> Any:
    source = linear.source
    write = Writer(model, linear.node)
    scale = write.constant(f"{linear.name}.input_scale", np.float32(max(largest, SMALLEST) / LARGEST))
    zero = write.constant("integer_zero", np.int8(0))
    rounded = write.node("DequantizeLinear", [write.node("QuantizeLinear", [source, scale, zero]), scale, zero])
    rounded.shape, rounded.type = source.shape, source.type
    return rounded


def cache_ranges(model: Any, caches: Sequence[KeyValueInfo], feeds: Feeds) -> dict[str, NDArray[np.float32]]:
    """[G] by cache name: the largest magnitude of each head's new keys or values on calibration data."""
    sources = {scatter.inputs[0].name: scatter.inputs[1].name for scatter in _scatters(model, caches)}
    ranges = {name: np.zeros(1, np.float32) for name in sources}
    for arrays in activations(model, list(sources.values()), feeds):
        for name, values in zip(ranges, arrays, strict=True):
            ranges[name] = np.maximum(ranges[name], np.abs(values).max(axis=(0, 2, 3)))
    return ranges


def quantize_caches(model: Any, caches: Sequence[KeyValueInfo], ranges: Mapping[str, NDArray[np.float32]]) -> None:
    """Store keys and values as int8, one scale per head; attention reads them dequantized."""
    import onnx_ir as ir

    for scatter in _scatters(model, caches):
        cache, new, updated = scatter.inputs[0], scatter.inputs[1], scatter.outputs[0]
        readers = [(node, index) for node, index in updated.uses()]
        scales = np.maximum(ranges[cache.name], SMALLEST) / LARGEST
        write = Writer(model, scatter)
        scale = write.constant(f"{cache.name}.scale", scales.astype(np.float32))
        zeros = write.constant(f"integer_zeros.{len(scales)}", np.zeros(len(scales), np.int8))
        scatter.replace_input_with(1, write.node("QuantizeLinear", [new, scale, zeros], axis=1))
        result = ir.node("DequantizeLinear", [updated, scale, zeros], attributes={"axis": 1})
        result.outputs[0].shape, result.outputs[0].type = updated.shape, updated.type
        model.graph.insert_after(scatter, result)
        for value in (cache, updated):
            value.type = ir.TensorType(ir.DataType.INT8)
        for node, index in readers:
            node.replace_input_with(index, result.outputs[0])


def _scatters(model: Any, caches: Sequence[KeyValueInfo]) -> list[Any]:
    """The TensorScatter nodes that write the caches, in the caches' order."""
    outputs = {value.name: value for value in model.graph.outputs}
    names = [contract.updated(name) for cache in caches for name in (cache.key_name, cache.value_name)]
    return [producer(outputs[name], "TensorScatter") for name in names]

"""A float32 graph becomes one of half precision (float16 or bfloat16), every value of one stated type.

Strongly typed builders compute exactly what the graph says, so the graph has to state where half precision is not enough. Kept
in float32 are

1. integers of more than 8 bits once they are cast to floats: float16 cannot represent every position above 2048;
2. squares and their means, roots, exponentials, sines and cosines: they overflow, or cancel;
3. everything that is computed from such values alone, until it is combined with an activation;
4. layers that compute or read values beyond float16's range, as far as `exporter.overflow` measured any.

Norms are one node each before this runs (`rms_norm`): their own attribute makes them sum in float32.
"""

from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .surgery import Writer, in_order
from .values import array_of, dtype_of, name_of, operand

FLOAT = ir.DataType.FLOAT
HALVES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
NUMPY_TYPES: dict[ir.DataType | None, Any] = {
    FLOAT: np.float32,
    HALVES["float16"]: np.float16,
    HALVES["bfloat16"]: ml_dtypes.bfloat16,
}
WIDE = {"Cos", "Sin", "Pow", "Exp", "Log", "ReduceMean", "ReduceSum", "Sqrt", "Reciprocal", "Softmax", "LogSoftmax"}
SMALL_INTEGERS = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.BOOL}


def to_half(model: ir.Model, dtype: str, overflowing: Collection[str] = ()) -> tuple[ir.Model, bool]:
    """Returns (model, whether anything changed). Every value's type must be known.

    Args:
        dtype: float16 or bfloat16.
        overflowing: names of values that stay float32, with the layers around them.
    """
    half = HALVES[dtype]
    wide = _wide_nodes(model, overflowing)
    inputs = [value for value in model.graph.inputs if value.dtype == FLOAT]
    for value in inputs:
        value.dtype = half
    converted: dict[tuple[str, ir.DataType], ir.Value] = {}
    for node in in_order(model):
        wanted = FLOAT if id(node) in wide else half
        for index, read in enumerate(node.inputs):
            if read is not None and read.dtype in NUMPY_TYPES and read.dtype != wanted and node.op_type != "Cast":
                node.replace_input_with(index, _converted(model, node, read, wanted, converted))
        _retype(node, wanted)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    return model, bool(inputs or converted)


def _wide_nodes(model: ir.Model, overflowing: Collection[str]) -> set[int]:
    """Ids of the nodes that compute in float32."""
    nodes: set[int] = set()
    values: set[int] = set()
    for node in model.graph:
        if _is_wide(node, values):
            nodes.add(id(node))
            values.update(id(value) for value in node.outputs)
    beyond = layers_beyond(model, overflowing)
    return nodes | {id(node) for node in beyond} | {id(node) for layer in beyond for node in _dequantizers(layer)}


def layers_beyond(model: ir.Model, overflowing: Collection[str]) -> list[ir.Node]:
    """The nodes that compute or read a value of those names. Their other outputs are passed on in half precision."""
    named = set(overflowing)
    return [node for node in model.graph if any(v is not None and v.name in named for v in (*node.inputs, *node.outputs))]


def _dequantizers(layer: ir.Node) -> list[ir.Node]:
    """The nodes that widen the weights of `layer`: both must have one type to be fused."""
    makers = [value.producer() for value in layer.inputs if value is not None and not value.is_graph_input()]
    return [node for node in makers if node is not None and node.op_type == "DequantizeLinear"]


def _is_wide(node: ir.Node, wide: set[int]) -> bool:
    computed = [v for v in node.inputs if v is not None and not v.is_initializer() and v.dtype in NUMPY_TYPES]
    if node.op_type in WIDE:
        return True
    if node.op_type == "Cast" and not computed:
        return dtype_of(operand(node, 0)) not in SMALL_INTEGERS
    return bool(computed) and all(id(value) in wide for value in computed)


def _converted(
    model: ir.Model, node: ir.Node, value: ir.Value, wanted: ir.DataType, converted: dict[tuple[str, ir.DataType], ir.Value]
) -> ir.Value:
    """`value` in the wanted type, converted once for all readers: a constant when lowered, anything else by a Cast."""
    key = (name_of(value), wanted)
    if key not in converted:
        write = Writer(model, node)
        if value.is_initializer():
            converted[key] = write.constant(f"{value.name}.{wanted.name.lower()}", in_range(array_of(value), wanted))
        else:
            converted[key] = write.node("Cast", [value], to=int(wanted))
            converted[key].dtype, converted[key].shape = wanted, value.shape
    return converted[key]


def in_range(array: NDArray[Any], wanted: ir.DataType) -> NDArray[Any]:
    """In the wanted type; values beyond its range, such as a mask's lowest float32, become its largest finite number."""
    kind = NUMPY_TYPES[wanted]
    limit = float(ml_dtypes.finfo(kind).max)
    result: NDArray[Any] = np.clip(array.astype(np.float32), -limit, limit).astype(kind)
    return result


def _retype(node: ir.Node, wanted: ir.DataType) -> None:
    for value in node.outputs:
        if value.dtype in NUMPY_TYPES:
            value.dtype = wanted
    if node.op_type == "Cast" and node.attributes["to"].value in (int(dtype) for dtype in NUMPY_TYPES if dtype is not None):
        node.attributes["to"] = ir.AttrInt64("to", int(wanted))

"""A float32 graph becomes one of half precision (float16 or bfloat16), every value of one stated type.

Strongly typed builders compute exactly what the graph says, so the graph has to say where half precision will not do. Kept
in float32 are

1. what whole numbers of more than 8 bits become: positions above 2048 have no float16 of their own;
2. squares and their means, roots, exponentials, sines and cosines: they overflow, or lose what little differs;
3. whatever is computed from such values alone, until it meets an activation;
4. layers that make or read values beyond float16's range, as far as they were found (`exporter.overflow`).

Norms are one node each before this runs (`rms_norm`): their own attribute says that they sum in float32.
"""

from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .surgery import Writer, in_order

FLOAT = ir.DataType.FLOAT
HALVES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
NUMPY_TYPES: dict[Any, Any] = {FLOAT: np.float32, HALVES["float16"]: np.float16, HALVES["bfloat16"]: ml_dtypes.bfloat16}
WIDE = {"Cos", "Sin", "Pow", "Exp", "Log", "ReduceMean", "ReduceSum", "Sqrt", "Reciprocal", "Softmax", "LogSoftmax"}
SMALL_WHOLE = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.BOOL}


def to_half(model: Any, dtype: str, overflowing: Collection[str] = ()) -> tuple[Any, bool]:
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
    converted: dict[tuple[str, Any], Any] = {}
    for node in in_order(model):
        wanted = FLOAT if id(node) in wide else half
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in NUMPY_TYPES and value.dtype != wanted and node.op_type != "Cast":
                node.replace_input_with(index, _converted(model, node, value, wanted, converted))
        _retype(node, wanted)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]
    return model, bool(inputs or converted)


def _wide_nodes(model: Any, overflowing: Collection[str]) -> set[int]:
    """Ids of the nodes that compute in float32."""
    nodes: set[int] = set()
    values: set[int] = set()
    for node in model.graph:
        if _is_wide(node, values):
            nodes.add(id(node))
            values.update(id(value) for value in node.outputs)
    beyond = layers_beyond(model, overflowing)
    return nodes | {id(node) for node in beyond} | {id(node) for layer in beyond for node in _dequantizers(layer)}


def layers_beyond(model: Any, overflowing: Collection[str]) -> list[Any]:
    """The nodes that make or read a value of those names. What they make beside it goes on in half precision."""
    named = set(overflowing)
    return [node for node in model.graph if any(v is not None and v.name in named for v in (*node.inputs, *node.outputs))]


def _dequantizers(layer: Any) -> list[Any]:
    """What widens the weights of `layer`: the multiplication and it have to speak of one type to be fused."""
    makers = [value.producer() for value in layer.inputs if value is not None and not value.is_graph_input()]
    return [node for node in makers if node is not None and node.op_type == "DequantizeLinear"]


def _is_wide(node: Any, wide: set[int]) -> bool:
    computed = [v for v in node.inputs if v is not None and not v.is_initializer() and v.dtype in NUMPY_TYPES]
    if node.op_type in WIDE:
        return True
    if node.op_type == "Cast" and not computed:
        return node.inputs[0].dtype not in SMALL_WHOLE
    return bool(computed) and all(id(value) in wide for value in computed)


def _converted(model: Any, node: Any, value: Any, wanted: Any, made: dict[tuple[str, Any], Any]) -> Any:
    """`value` in the wanted type, made once: a constant anew, anything else by a Cast."""
    key = (value.name, wanted)
    if key not in made:
        write = Writer(model, node)
        if value.is_initializer():
            made[key] = write.constant(f"{value.name}.{wanted.name.lower()}", in_range(value.const_value.numpy(), wanted))
        else:
            made[key] = write.node("Cast", [value], to=int(wanted))
            made[key].dtype, made[key].shape = wanted, value.shape
    return made[key]


def in_range(array: NDArray[Any], wanted: Any) -> NDArray[Any]:
    """In the wanted type; what lies beyond its range, as a mask's lowest float32 does, becomes the last number inside."""
    kind = NUMPY_TYPES[wanted]
    limit = float(ml_dtypes.finfo(kind).max)
    result: NDArray[Any] = np.clip(array.astype(np.float32), -limit, limit).astype(kind)
    return result


def _retype(node: Any, wanted: Any) -> None:
    for value in node.outputs:
        if value.dtype in NUMPY_TYPES:
            value.dtype = wanted
    if node.op_type == "Cast" and node.attributes["to"].value in (int(dtype) for dtype in NUMPY_TYPES):
        node.attributes["to"] = ir.AttrInt64("to", int(wanted))

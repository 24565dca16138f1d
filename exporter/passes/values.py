"""What a graph states of its values. onnx_ir leaves all of it optional; canonical graphs state it, and passes rely on that."""

from typing import Any, TypeVar

import onnx_ir as ir
from numpy.typing import NDArray

from headstart.runtime.errors import EngineError

T = TypeVar("T")


def stated(thing: T | None, what: str) -> T:
    """`thing`, which a graph may leave out. Raises EngineError, a defect of a pass or of the tracing, where it does."""
    if thing is None:
        raise EngineError(f"A graph does not state {what}. This is a defect of a pass: report it, with the checkpoint's name.")
    return thing


def operand(node: ir.Node, index: int) -> ir.Value:
    """An input that the node must have."""
    return stated(node.inputs[index], f"input {index} of the {node.op_type} {node.name}")


def name_of(value: ir.Value) -> str:
    return stated(value.name, "the name of a value")


def dtype_of(value: ir.Value) -> ir.DataType:
    return stated(value.dtype, f"the type of {value.name}")


def shape_of(value: ir.Value) -> ir.Shape:
    return stated(value.shape, f"the shape of {value.name}")


def size_of(value: ir.Value, axis: int) -> int:
    """A size that is fixed."""
    size = shape_of(value)[axis]
    return stated(size if isinstance(size, int) else None, f"the size of axis {axis} of {value.name}")


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """What an initializer holds."""
    return stated(value.const_value, f"the tensor of {value.name}")


def array_of(value: ir.Value) -> NDArray[Any]:
    """What an initializer holds, as numpy sees it."""
    array: NDArray[Any] = tensor_of(value).numpy()
    return array


def new_initializer(tensor: ir.TensorProtocol) -> ir.Value:
    """A value of the tensor's name, shape and type, not yet part of a graph."""
    shape = ir.Shape(tuple(size for size in tensor.shape if isinstance(size, int)))
    return ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)

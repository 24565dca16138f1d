"""The few moves every pass makes on an onnx_ir graph: look up, add, put in place of, clean up."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.convenience import extract
from onnx_ir.passes import common

MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators


def producer(value: Any, op: str) -> Any:
    """The node that makes `value`, when it is an `op`; else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op else None


def constant_of(value: Any) -> NDArray[Any] | None:
    """The array of an initializer; None for anything computed."""
    if value is None or not value.is_initializer():
        return None
    array: NDArray[Any] = value.const_value.numpy()
    return array


def integers(value: Any) -> list[int] | None:
    """A constant's entries, flat."""
    array = constant_of(value)
    return None if array is None else [int(x) for x in array.reshape(-1)]


def only_user(value: Any) -> Any:
    """The one node that reads `value`; None when there are several, or when it leaves the graph."""
    users = {id(node): node for node, _ in value.uses()}
    return next(iter(users.values())) if len(users) == 1 and not value.is_graph_output() else None


def part_in_memory(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> bytes | None:
    """The part of a graph that computes `outputs` from `inputs`, serialized; None when it also reads another input.

    Its weights are part of the bytes: a session opened from bytes has no folder in which to look up an external data file, and
    a tensor of any size may be stored in one.
    """
    try:
        part = ir.Model(extract(model.graph, inputs=list(inputs), outputs=list(outputs)), ir_version=model.ir_version)
    except ValueError:
        return None
    ir.external_data.load_to_model(part)
    return bytes(ir.to_proto(part).SerializeToString())


class Writer:
    """Adds nodes in front of an anchor node (at the end of the graph without one), and constants, each constant once."""

    def __init__(self, model: Any, anchor: Any) -> None:
        self.graph = model.graph
        self._anchor = anchor

    def nodes(self, op: str, inputs: Sequence[Any], outputs: int, domain: str = "", **attributes: Any) -> list[Any]:
        node = ir.node(op, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        if self._anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self._anchor, node)
        return list(node.outputs)

    def node(self, op: str, inputs: Sequence[Any], domain: str = "", **attributes: Any) -> Any:
        return self.nodes(op, inputs, 1, domain, **attributes)[0]

    def constant(self, name: str, array: NDArray[Any] | np.generic) -> Any:
        """An initializer of that name, made now unless it is there."""
        kept = self.graph.initializers.get(name)
        if kept is None:
            tensor = ir.tensor(np.asarray(array), name=name)
            kept = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.register_initializer(kept)
        return kept

    def ints(self, values: Sequence[int]) -> Any:
        """A 1-D int64 constant, named after its entries."""
        return self.constant("ints_" + "_".join(map(str, values)).replace("-", "m"), np.array(values, np.int64))


def replace_value(old: Any, new: Any) -> None:
    """Let every reader of `old`, the graph's outputs included, read `new`; an output keeps its name."""
    graph = old.graph
    name = old.name
    new.shape, new.type = new.shape or old.shape, new.type or old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if any(value is new for value in graph.outputs):
        old.name, new.name = f"{name}.replaced", name


def clean(model: Any) -> None:
    """Drop what nothing reads any more, and merge what is computed twice."""
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def in_order(model: Any) -> list[Any]:
    """A copy of the node list, so that a pass may change the graph while it walks."""
    return list(model.graph)

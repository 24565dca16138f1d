"""The few edits that every pass makes to an onnx_ir graph: look up, add, replace, clean up."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.convenience import extract
from onnx_ir.passes import common

from .values import array_of, new_initializer, operand, stated

MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators


def producer(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node that computes `value`, when it is an `op`; else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op else None


def constant_of(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer; None for anything computed."""
    if value is None or not value.is_initializer():
        return None
    return array_of(value)


def integers(value: ir.Value | None) -> list[int] | None:
    """A constant's entries, flat."""
    array = constant_of(value)
    return None if array is None else [int(x) for x in array.reshape(-1)]


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`; None when there are several, or when it leaves the graph."""
    users = {id(node): node for node, _ in value.uses()}
    return next(iter(users.values())) if len(users) == 1 and not value.is_graph_output() else None


def own_initializer(node: ir.Node, index: int) -> ir.Value:
    """The initializer that `node` reads there; a separate copy if others read it too (equal vectors are stored once)."""
    shared = operand(node, index)
    if len(shared.uses()) == 1:
        return shared
    own = new_initializer(ir.tensor(array_of(shared), name=f"{shared.name}.{node.outputs[0].name}"))
    stated(node.graph, f"the graph of {node.name}").register_initializer(own)
    node.replace_input_with(index, own)
    return own


def part_in_memory(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> bytes | None:
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
    """Adds nodes before an anchor node (at the end of the graph without one), and constants, each constant once."""

    def __init__(self, model: ir.Model, anchor: ir.Node | None) -> None:
        self.graph = model.graph
        self._anchor = anchor

    def nodes(
        self, op: str, inputs: Sequence[ir.Value | None], outputs: int, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        node = ir.node(op, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        if self._anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self._anchor, node)
        return list(node.outputs)

    def node(self, op: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        return self.nodes(op, inputs, 1, domain, **attributes)[0]

    def constant(self, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
        """The initializer of that name, created unless the graph has one."""
        kept = self.graph.initializers.get(name)
        if kept is None:
            kept = new_initializer(ir.tensor(np.asarray(array), name=name))
            self.graph.register_initializer(kept)
        return kept

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A 1-D int64 constant, named after its entries."""
        return self.constant("ints_" + "_".join(map(str, values)).replace("-", "m"), np.array(values, np.int64))


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old`, the graph's outputs included, read `new`; an output keeps its name."""
    graph = stated(old.graph, f"the graph of {old.name}")
    name = old.name
    new.shape, new.type = new.shape or old.shape, new.type or old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if any(value is new for value in graph.outputs):
        old.name, new.name = f"{name}.replaced", name


def clean(model: ir.Model) -> None:
    """Remove what nothing reads any more, and merge what is computed twice."""
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def in_order(model: ir.Model) -> list[ir.Node]:
    """A copy of the node list, so that a pass may change the graph while it walks."""
    return list(model.graph)

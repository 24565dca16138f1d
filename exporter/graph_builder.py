"""Building a small ONNX graph node by node: a front-end's, or a draft head's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.runtime.contract import OPSET

from .passes.values import new_initializer


class GraphBuilder:
    """Collects the nodes and weights of one small graph."""

    def __init__(self) -> None:
        self._nodes: list[ir.Node] = []
        self._weights: list[ir.Value] = []

    def nodes(self, op: str, inputs: Sequence[ir.Value | None], outputs: int, **attributes: Any) -> list[ir.Value]:
        node = ir.node(op, inputs, attributes=attributes, num_outputs=outputs)
        self._nodes.append(node)
        return list(node.outputs)

    def node(self, op: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        return self.nodes(op, inputs, 1, **attributes)[0]

    def constant(self, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
        return self.weight(ir.tensor(np.asarray(array), name=name))

    def ints(self, name: str, values: Sequence[int]) -> ir.Value:
        return self.constant(name, np.array(values, np.int64))

    def weight(self, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer of the tensor's own name; the tensor may lie in another graph's data file."""
        value = new_initializer(tensor)
        self._weights.append(value)
        return value

    def model(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str) -> ir.Model:
        graph = ir.Graph(inputs, outputs, nodes=self._nodes, initializers=self._weights, opset_imports={"": OPSET}, name=name)
        return ir.Model(graph, ir_version=11)

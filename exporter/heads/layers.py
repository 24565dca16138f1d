"""Layers of draft heads as nodes: linear ones, whose weights any number of levels may share, and SiLU."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.exporter.graph_builder import GraphBuilder

Linear = tuple[NDArray[np.float32], NDArray[np.float32] | None]  # weight [out, in], bias [out]


class LinearLayer:
    """Stored once in one graph."""

    def __init__(self, graph: GraphBuilder, weights: Linear, name: str) -> None:
        weight, bias = weights
        self._graph = graph
        self._weight = graph.constant(f"{name}.weight", np.ascontiguousarray(weight.T))
        self.bias = None if bias is None else graph.constant(f"{name}.bias", bias)

    def of(self, value: ir.Value) -> ir.Value:
        """[…, in] to […, out]"""
        product = self._graph.node("MatMul", [value, self._weight])
        return product if self.bias is None else self._graph.node("Add", [product, self.bias])


def silu(graph: GraphBuilder, value: ir.Value) -> ir.Value:
    return graph.node("Mul", [value, graph.node("Sigmoid", [value])])

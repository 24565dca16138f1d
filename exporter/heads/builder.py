"""Writing a small ONNX graph by hand: nodes, weights, and references to weights that lie in another graph's file."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.exporter.graph import store_weights
from headstart.runtime.bundle import Bundle, WeightInfo
from headstart.runtime.contract import OPSET


class GraphBuilder:
    """Collects the nodes and weights of one small graph."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._weights: list[Any] = []

    def nodes(self, op: str, inputs: list[Any], outputs: int, **attributes: Any) -> list[Any]:
        node = ir.node(op, inputs, attributes=attributes, num_outputs=outputs)
        self._nodes.append(node)
        return list(node.outputs)

    def node(self, op: str, inputs: list[Any], **attributes: Any) -> Any:
        return self.nodes(op, inputs, 1, **attributes)[0]

    def constant(self, name: str, array: NDArray[Any]) -> Any:
        return self._initializer(name, ir.tensor(array, name=name))

    def ints(self, name: str, values: list[int]) -> Any:
        return self.constant(name, np.array(values, np.int64))

    def reference(self, name: str, info: WeightInfo) -> Any:
        """A weight that lies in another graph's data file."""
        return self._initializer(name, reference(name, info))

    def _initializer(self, name: str, tensor: Any) -> Any:
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._weights.append(value)
        return value

    def model(self, inputs: list[Any], outputs: list[Any], name: str) -> Any:
        graph = ir.Graph(inputs, outputs, nodes=self._nodes, initializers=self._weights, opset_imports={"": OPSET}, name=name)
        return ir.Model(graph, ir_version=11)

    def save(self, inputs: list[Any], outputs: list[Any], file: Path) -> None:
        save_head(self.model(inputs, outputs, "head"), file)


def reference(name: str, info: WeightInfo) -> Any:
    """A tensor that lies in another graph's data file, two folders up from a head's."""
    dtype = ir.DataType.from_numpy(np.dtype(info.dtype))
    length = int(np.prod(info.shape)) * np.dtype(info.dtype).itemsize
    return ir.ExternalTensor(f"../../{info.file}", info.offset, length, dtype, shape=ir.Shape(info.shape), name=name)


def save_head(model: Any, file: Path) -> None:
    """Write a head's graph and its own weights; references to other files stay references, which ir.save would copy in."""
    shared = [weight.name for weight in model.graph.initializers.values() if _is_reference(weight)]
    store_weights(model, file, shared)
    model.producer_name = "headstart"
    ir.save(model, file)


def _is_reference(weight: Any) -> bool:
    return isinstance(weight.const_value, ir.ExternalTensor) and str(weight.const_value.location).startswith("..")


def load_head(bundle: Bundle, name: str) -> Any:
    """A head's graph, with the weights it shares with the target read in: they lie outside its folder, where loaders stop."""
    info = bundle.head(name)
    model = ir.load(bundle.path / info.graph.file)
    for shared, weight in info.shared.items():
        array = np.memmap(bundle.path / weight.file, weight.dtype, "r", weight.offset, weight.shape)
        model.graph.initializers[shared].const_value = ir.tensor(array, name=shared)
    return model

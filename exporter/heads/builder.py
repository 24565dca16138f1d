"""Writing a small ONNX graph by hand: nodes, weights, and references to weights that lie in another graph's file."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.runtime.bundle import WeightInfo
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
        """A weight that lies in another graph's data file, two folders up."""
        dtype = ir.DataType.from_numpy(np.dtype(info.dtype))
        length = int(np.prod(info.shape)) * np.dtype(info.dtype).itemsize
        return self._initializer(
            name, ir.ExternalTensor(f"../../{info.file}", info.offset, length, dtype, shape=ir.Shape(info.shape), name=name)
        )

    def _initializer(self, name: str, tensor: Any) -> Any:
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._weights.append(value)
        return value

    def save(self, inputs: list[Any], outputs: list[Any], file: Path) -> None:
        graph = ir.Graph(inputs, outputs, nodes=self._nodes, initializers=self._weights, opset_imports={"": OPSET}, name="head")
        # By hand rather than by ir.save's own option, which would copy the shared weight in as well.
        own = [w for w in self._weights if not isinstance(w.const_value, ir.ExternalTensor) and w.const_value.nbytes > 1024]
        tensors = ir.external_data.convert_tensors_to_external([w.const_value for w in own], file.parent, f"{file.name}.data")
        for weight, tensor in zip(own, tensors, strict=True):
            weight.const_value = tensor
        ir.save(ir.Model(graph, ir_version=11, producer_name="headstart"), file)

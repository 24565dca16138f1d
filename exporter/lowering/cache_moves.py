"""Small graphs that rearrange caches where they lie, for a device whose memory the host does not touch.

Both gather first and write with TensorScatter then, whose output is bound to its input: what is gathered is a copy, so that
nothing is overwritten that is still needed.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from headstart.runtime import contract


def commit_graph(decoder: Any) -> Any:
    """Of one sequence: copy slots `slots` [n] to `write_index` [1] and behind it, in every cache of a lowered decoder."""
    return _graph(decoder, "slots", 2, 1)


def gather_graph(decoder: Any) -> Any:
    """Of a batch: sequence i becomes what sequence `rows[i]` was; `write_index` [B] is zero."""
    return _graph(decoder, "rows", 0, "batch")


def _graph(decoder: Any, index_name: str, axis: int, batch: int | str) -> Any:
    index = _value(index_name, ["batch" if index_name == "rows" else "moved"], ir.DataType.INT64)
    begin = _value(contract.WRITE_INDEX, [batch], ir.DataType.INT64)
    caches, nodes, outputs = [], [], []
    updated = {value.name for value in decoder.graph.outputs}
    for cache in decoder.graph.inputs:
        if contract.updated(cache.name) not in updated:
            continue
        whole = _value(cache.name, [batch, *cache.shape[1:]], cache.dtype)
        taken = ir.node("Gather", [whole, index], attributes={"axis": axis})
        written = ir.node("TensorScatter", [whole, taken.outputs[0], begin], attributes={"axis": 2})
        out = written.outputs[0]
        out.name, out.dtype, out.shape = contract.updated(cache.name), whole.dtype, whole.shape
        caches.append(whole)
        nodes += [taken, written]
        outputs.append(out)
    graph = ir.Graph([index, begin, *caches], outputs, nodes=nodes, opset_imports={"": contract.OPSET}, name=index_name)
    return ir.Model(graph, ir_version=decoder.ir_version)


def _value(name: str, shape: Sequence[Any], dtype: Any) -> Any:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

"""Small graphs that rearrange caches in place, for a device whose memory the host does not touch.

Both gather first and then write with TensorScatter, whose output is bound to its input: what is gathered is a copy, so that
nothing is overwritten that is still needed.
"""

from collections.abc import Sequence

import onnx_ir as ir

from headstart.exporter.passes.values import dtype_of, name_of, shape_of
from headstart.runtime import contract


def commit_graph(decoder: ir.Model) -> ir.Model:
    """Of one sequence: copy slots `slots` [n] to `write_index` [1] and onwards, in every cache of a lowered decoder."""
    return _graph(decoder, "slots", 2, 1)


def gather_graph(decoder: ir.Model) -> ir.Model:
    """Of a batch: sequence i becomes what sequence `rows[i]` was; `write_index` [B] is zero."""
    return _graph(decoder, "rows", 0, "batch")


def _graph(decoder: ir.Model, index_name: str, axis: int, batch: int | str) -> ir.Model:
    index = _value(index_name, ["batch" if index_name == "rows" else "moved"], ir.DataType.INT64)
    begin = _value(contract.WRITE_INDEX, [batch], ir.DataType.INT64)
    caches, nodes, outputs = [], [], []
    updated = {value.name for value in decoder.graph.outputs}
    for cache in decoder.graph.inputs:
        name = name_of(cache)
        if contract.updated(name) not in updated:
            continue
        whole = _value(name, [batch, *shape_of(cache)[1:]], dtype_of(cache))
        taken = ir.node("Gather", [whole, index], attributes={"axis": axis})
        written = ir.node("TensorScatter", [whole, taken.outputs[0], begin], attributes={"axis": 2})
        out = written.outputs[0]
        out.name, out.dtype, out.shape = contract.updated(name), dtype_of(whole), whole.shape
        caches.append(whole)
        nodes += [taken, written]
        outputs.append(out)
    graph = ir.Graph([index, begin, *caches], outputs, nodes=nodes, opset_imports={"": contract.OPSET}, name=index_name)
    return ir.Model(graph, ir_version=decoder.ir_version)


def _value(name: str, shape: Sequence[int | str | ir.SymbolicDim], dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

"""Head graphs on disk: their own weights, and references to weights that lie in the target's data file."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from headstart.exporter.graph import store_weights
from headstart.exporter.graph_builder import GraphBuilder
from headstart.runtime.bundle import Bundle, WeightInfo
from headstart.runtime.token_rows import TokenRows, mapped


def reference(name: str, info: WeightInfo) -> ir.ExternalTensor:
    """A tensor that lies in another graph's data file, two folders up from a head's."""
    dtype = ir.DataType.from_numpy(np.dtype(info.dtype))
    length = int(np.prod(info.shape)) * np.dtype(info.dtype).itemsize
    return ir.ExternalTensor(f"../../{info.file}", info.offset, length, dtype, shape=ir.Shape(info.shape), name=name)


def copied_rows(graph: GraphBuilder, rows: TokenRows) -> ir.Value:
    """[H, rows] of a target's LM head, stored as the target stores them: whole numbers stay whole numbers."""
    if rows.scales is None:
        return graph.constant("projection.weight", np.ascontiguousarray(rows.values.T))
    values, scales = graph.constant("projection.weight", rows.values), graph.constant("projection.scale", rows.scales)
    return graph.node("Transpose", [graph.node("DequantizeLinear", [values, scales], axis=0)], perm=[1, 0])


def save_head(model: ir.Model, file: Path) -> None:
    """Write a head's graph and its own weights; references to other files stay references, which ir.save would copy in."""
    shared = [str(weight.name) for weight in model.graph.initializers.values() if _is_reference(weight)]
    store_weights(model, file, shared)
    model.producer_name = "headstart"
    ir.save(model, file)


def _is_reference(weight: ir.Value) -> bool:
    return isinstance(weight.const_value, ir.ExternalTensor) and str(weight.const_value.location).startswith("..")


def load_head(bundle: Bundle, name: str) -> ir.Model:
    """A head's graph, with the weights it shares with the target read in: they lie outside its folder, where loaders stop."""
    info = bundle.head(name)
    model = ir.load(bundle.path / info.graph.file)
    for shared, weight in info.shared.items():
        model.graph.initializers[shared].const_value = ir.tensor(mapped(bundle.path, weight), name=shared)
    return model

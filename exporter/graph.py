"""The traced graph on its way to disk: weights get their checkpoint's names, shared ones are found, files are written."""

import ast
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx_ir as ir

from headstart.exporter.passes.linear import is_lm_head, linears
from headstart.runtime.bundle import GraphInfo, TensorInfo, WeightInfo

SMALL = 1024  # bytes; smaller weights stand inside the graph's own file
SCOPES = "pkg.torch.onnx.name_scopes"  # metadata the tracer leaves on each node: the module path it came from


def name_weights(model: Any, prefix: str = "model.") -> None:
    """Give folded weights (`val_17`) the name of the module that uses them, as in the checkpoint.

    Quantization recipes and readers of the graph look for these names. `prefix` is the wrapper's attribute.
    """
    taken = set(model.graph.initializers)
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm", "Gather") or SCOPES not in node.metadata_props:
            continue
        for value in node.inputs:
            if value is not None and value.is_initializer() and value.name.startswith("val_") and len(value.shape) == 2:
                name = f"{prefix}{_module_path(node)}.weight"
                if name not in taken:
                    taken.add(name)
                    _rename_initializer(model, value, name)
    for value in list(model.graph.initializers.values()):
        if value.name.startswith(f"{prefix}"):
            _rename_initializer(model, value, value.name.removeprefix(prefix))


def _module_path(node: Any) -> str:
    """The innermost module of a node: the last scope but one is the module, the last is the operation."""
    scopes: list[str] = ast.literal_eval(node.metadata_props[SCOPES])
    return scopes[-2].removeprefix("model.") if len(scopes) > 1 else node.name


def _rename_initializer(model: Any, value: Any, name: str) -> None:
    model.graph.initializers.pop(value.name)
    value.name = name
    model.graph.initializers[name] = value


def save_graph(model: Any, file: Path) -> None:
    """Write `file` and its weights beside it (`file.data`); each tensor once, however often it is used."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _strip(model)
    ir.save(model, file, external_data=f"{file.name}.data")


def _strip(model: Any) -> None:
    model.producer_name = "headstart"
    for node in model.graph:  # stack traces of the exporting machine: half the file, and nobody else's business
        node.metadata_props.clear()
        node.doc_string = None


def save_beside(model: Any, file: Path, other: Path) -> None:
    """As `save_graph`, but weights which `other`, in the same folder, holds under the same name are read from there."""
    _strip(model)
    store_weights(model, file, _share(model, other))
    ir.save(model, file)


def store_weights(model: Any, file: Path, shared: Collection[str]) -> None:
    """Write a graph's weights, all but the `shared` ones, to `file.data`, `file` being the graph; small ones stay in it.

    A weight may have been loaded from the data file of another folder. Saved as it is, it would keep offset and file name, and
    be read from a file of that name in the new folder: other bytes, and no error.
    """
    own = [weight for name, weight in model.graph.initializers.items() if name not in shared]
    large = [weight for weight in own if weight.const_value.nbytes > SMALL]
    small = [w for w in own if w.const_value.nbytes <= SMALL and isinstance(w.const_value, ir.ExternalTensor)]
    tensors = ir.external_data.convert_tensors_from_external([weight.const_value for weight in small])
    if large:  # without any, an empty file would be written
        large_tensors = [weight.const_value for weight in large]
        tensors += ir.external_data.convert_tensors_to_external(large_tensors, file.parent, f"{file.name}.data")
    for weight, tensor in zip([*small, *large], tensors, strict=True):
        weight.const_value = tensor


def _share(model: Any, other: Path) -> set[str]:
    """Let weights that `other` holds be read from there; returns their names."""
    shared = set()
    stored = {name: value.const_value for name, value in ir.load(other).graph.initializers.items()}
    for name, value in model.graph.initializers.items():
        twin = stored.get(name)
        if isinstance(twin, ir.ExternalTensor) and _equal(twin, value.const_value):
            value.const_value = twin
            shared.add(name)
    return shared


def _equal(a: Any, b: Any) -> bool:
    """Of the same bytes: names that the tracer made up are no proof."""
    return bool((a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes())


def graph_info(model: Any, file: str) -> GraphInfo:
    return GraphInfo(file, tensor_infos(model.graph.inputs), tensor_infos(model.graph.outputs))


def tensor_infos(values: Any) -> tuple[TensorInfo, ...]:
    """The manifest's description of a graph's inputs or outputs."""
    return tuple(
        TensorInfo(v.name, dtype_name(v.dtype), tuple(d if isinstance(d, int) else str(d.value) for d in v.shape))
        for v in values
    )


def dtype_name(dtype: Any) -> str:
    """numpy's name of an ONNX element type: float32, int64, bool, …"""
    return str(dtype.numpy())


def weight_infos(file: Path, folder: str) -> dict[str, WeightInfo]:
    """Where the weights that other graphs may share lie: the LM head, with its scales when it is quantized."""
    model = ir.load(file)
    vocabulary = model.graph.outputs[0].shape[2]
    head = next((linear for linear in reversed(list(linears(model))) if is_lm_head(linear, vocabulary)), None)
    if head is None:
        return {}
    named = {"lm_head": head.weight} | ({"lm_head.scale": head.scales} if head.quantized else {})
    if not all(isinstance(value.const_value, ir.ExternalTensor) for value in named.values()):
        return {}
    return {name: _weight_info(value.const_value, folder) for name, value in named.items()}


def _weight_info(tensor: Any, folder: str) -> WeightInfo:
    return WeightInfo(f"{folder}/{tensor.location}", tensor.offset or 0, dtype_name(tensor.dtype), tuple(tensor.shape.numpy()))

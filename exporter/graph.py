"""The traced graph on its way to disk: weights get their checkpoint's names, shared ones are found, files are written."""

import ast
from pathlib import Path
from typing import Any

import onnx_ir as ir

from headstart.runtime.bundle import GraphInfo, TensorInfo, WeightInfo

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
    model.producer_name = "headstart"
    for node in model.graph:  # stack traces of the exporting machine: half the file, and nobody else's business
        node.metadata_props.clear()
        node.doc_string = None
    ir.save(model, file, external_data=f"{file.name}.data")


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
    """Where the weights that other graphs may share lie. Today: the LM head, which draft heads project with."""
    model = ir.load(file)
    value = _lm_head(model)
    if value is None or not isinstance(value.const_value, ir.ExternalTensor):
        return {}
    tensor = value.const_value
    info = WeightInfo(f"{folder}/{tensor.location}", tensor.offset or 0, dtype_name(tensor.dtype), tuple(tensor.shape.numpy()))
    return {"lm_head": info}


def _lm_head(model: Any) -> Any:
    """The initializer of the MatMul that makes the logits, looking up through element-wise ends and a Transpose."""
    vocabulary = model.graph.outputs[0].shape[2]
    value = model.graph.outputs[0]
    while (node := value.producer()) is not None:
        weights = [_through_transpose(v) for v in node.inputs if v is not None]
        for weight in weights:
            if weight.is_initializer() and len(weight.shape) == 2 and vocabulary in tuple(weight.shape):
                return weight
        value = node.inputs[0]
        if node.op_type in ("Attention", "Softmax"):
            return None
    return None


def _through_transpose(value: Any) -> Any:
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Transpose" else value

"""Graphs on disk: weights get their checkpoint's names, shared ones are stored once, files are written."""

import ast
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from headstart.exporter.passes.linear import is_lm_head, linears
from headstart.exporter.passes.rotation import rotation_of
from headstart.exporter.passes.values import dtype_of, name_of, shape_of, size_of, tensor_of
from headstart.runtime import contract
from headstart.runtime.bundle import GraphInfo, KeyValueInfo, RecurrentInfo, TensorInfo, WeightInfo

SMALL = 1024  # bytes; smaller weights stand inside the graph's own file
SCOPES = "pkg.torch.onnx.name_scopes"  # metadata the tracer leaves on each node: the module path it came from


def name_weights(model: ir.Model, prefix: str = "model.") -> None:
    """Give folded weights (`val_17`) the name of the module that uses them, as in the checkpoint.

    Quantization recipes and readers of the graph look for these names. `prefix` is the wrapper's attribute.
    """
    taken = set(model.graph.initializers)
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm", "Gather") or SCOPES not in node.metadata_props:
            continue
        for value in node.inputs:
            if value is not None and value.is_initializer() and _is_folded_matrix(value):
                name = f"{prefix}{_module_path(node)}.weight"
                if name not in taken:
                    taken.add(name)
                    _rename_initializer(model, value, name)
    for value in list(model.graph.initializers.values()):
        if name_of(value).startswith(prefix):
            _rename_initializer(model, value, name_of(value).removeprefix(prefix))


def _is_folded_matrix(weight: ir.Value) -> bool:
    return name_of(weight).startswith("val_") and len(shape_of(weight)) == 2


def _module_path(node: ir.Node) -> str:
    """The innermost module of a node: the last scope but one is the module, the last is the operation."""
    scopes: list[str] = ast.literal_eval(node.metadata_props[SCOPES])
    return scopes[-2].removeprefix("model.") if len(scopes) > 1 else str(node.name)


def _rename_initializer(model: ir.Model, value: ir.Value, name: str) -> None:
    model.graph.initializers.pop(name_of(value))
    value.name = name
    model.graph.initializers[name] = value


def save_graph(model: ir.Model, file: Path) -> None:
    """Write `file` and its weights (`file.data`, in the same folder); each tensor once, however often it is used."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _strip(model)
    ir.save(model, file, external_data=f"{file.name}.data")


def _strip(model: ir.Model) -> None:
    model.producer_name = "headstart"
    for node in model.graph:  # stack traces of the exporting machine: half the file, and private
        node.metadata_props.clear()
        node.doc_string = None


def save_beside(model: ir.Model, file: Path, other: Path) -> None:
    """As `save_graph`, but weights which `other`, in the same folder, holds under the same name are read from there."""
    _strip(model)
    store_weights(model, file, _share(model, other))
    ir.save(model, file)


def store_weights(model: ir.Model, file: Path, shared: Collection[str]) -> None:
    """Write a graph's weights, all but the `shared` ones, to `file.data`, `file` being the graph; small ones stay in it.

    A weight may have been loaded from the data file of another folder. Saved as it is, it would keep offset and file name, and
    be read from a file of that name in the new folder: other bytes, and no error.
    """
    own = [weight for name, weight in model.graph.initializers.items() if name not in shared]
    large = [weight for weight in own if tensor_of(weight).nbytes > SMALL]
    small = [w for w in own if tensor_of(w).nbytes <= SMALL and isinstance(w.const_value, ir.ExternalTensor)]
    tensors = ir.external_data.convert_tensors_from_external([tensor_of(weight) for weight in small])
    if large:  # without any, an empty file would be written
        large_tensors = [tensor_of(weight) for weight in large]
        tensors += ir.external_data.convert_tensors_to_external(large_tensors, file.parent, f"{file.name}.data")
    for weight, tensor in zip([*small, *large], tensors, strict=True):
        weight.const_value = tensor


def _share(model: ir.Model, other: Path) -> set[str]:
    """Let weights that `other` holds be read from there; returns their names."""
    shared = set()
    stored = {name: value.const_value for name, value in ir.load(other).graph.initializers.items()}
    for name, value in model.graph.initializers.items():
        twin = stored.get(name)
        if isinstance(twin, ir.ExternalTensor) and _equal(twin, tensor_of(value)):
            value.const_value = twin
            shared.add(name)
    return shared


def _equal(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    """Of the same bytes: equal names that the tracer generated prove nothing."""
    return bool((a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes())


def graph_info(model: ir.Model, file: str) -> GraphInfo:
    """The manifest's description of a graph: its states and sources are told by the contract's names."""
    return described_graph(file, tensor_infos(model.graph.inputs), tensor_infos(model.graph.outputs))


def described_graph(file: str, inputs: tuple[TensorInfo, ...], outputs: tuple[TensorInfo, ...]) -> GraphInfo:
    """An input whose updated self comes out is a state: key/value slots by their names, all others recurrent."""
    updated = {tensor.name for tensor in outputs}
    states = {tensor.name: tensor for tensor in inputs if contract.updated(tensor.name) in updated}
    slots = _pairs(states, contract.key_name, contract.value_name)
    paired = {name for pair in slots for name in pair.sizes()}
    recurrent = tuple(_recurrent(tensor) for name, tensor in states.items() if name not in paired)
    reads = _pairs({tensor.name: tensor for tensor in inputs}, contract.cross_key_name, contract.cross_value_name)
    return GraphInfo(file, inputs, outputs, slots, recurrent, reads)


def _pairs(
    tensors: Mapping[str, TensorInfo], key_name: Callable[[int], str], value_name: Callable[[int], str]
) -> tuple[KeyValueInfo, ...]:
    """The keys and values among `tensors`, by layer. A graph of a model's last layers may begin with any."""
    prefix = key_name(0).removesuffix("0")
    layers = [int(name.removeprefix(prefix)) for name in tensors if name.startswith(prefix)]
    pairs = [(tensors[key_name(layer)], tensors[value_name(layer)]) for layer in layers]
    return tuple(
        KeyValueInfo(key.name, value.name, int(key.shape[1]), int(key.shape[3]), int(value.shape[3]), key.dtype)
        for key, value in pairs
    )


def _recurrent(tensor: TensorInfo) -> RecurrentInfo:
    return RecurrentInfo(tensor.name, tuple(int(size) for size in tensor.shape[1:]), tensor.dtype)


def tensor_infos(values: Iterable[ir.Value]) -> tuple[TensorInfo, ...]:
    """The manifest's description of a graph's inputs or outputs."""
    return tuple(
        TensorInfo(name_of(v), dtype_name(dtype_of(v)), tuple(d if isinstance(d, int) else str(d.value) for d in shape_of(v)))
        for v in values
    )


def dtype_name(dtype: ir.DataType) -> str:
    """numpy's name of an ONNX element type: float32, int64, bool, …"""
    return str(dtype.numpy())


def weight_infos(file: Path, folder: str) -> dict[str, WeightInfo]:
    """Where the weights that other graphs may share lie: the LM head, with its scales when it is quantized."""
    model = ir.load(file)
    vocabulary = size_of(model.graph.outputs[0], 2)
    head = next((linear for linear in reversed(list(linears(model))) if is_lm_head(linear, vocabulary)), None)
    if head is None:
        return {}
    named = {"lm_head": head.weight} | ({"lm_head.scale": head.required_scales} if head.quantized else {})
    tensors = {name: value.const_value for name, value in named.items()}
    external = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)}
    if len(external) < len(named):
        return {}
    infos = {name: weight_info(tensor, folder) for name, tensor in external.items()}
    return infos | {"lm_head": dataclasses.replace(infos["lm_head"], rotation=rotation_of(head.source))}


def weight_info(tensor: ir.ExternalTensor, folder: str) -> WeightInfo:
    """Where the tensor of a graph in that folder of the bundle lies."""
    return WeightInfo(f"{folder}/{tensor.location}", tensor.offset or 0, dtype_name(tensor.dtype), tuple(tensor.shape.numpy()))

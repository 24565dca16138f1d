"""Small graphs with states of every kind, in realistic sizes: a draft head's attention layer, and a linear recurrence."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from headstart.exporter.graph import graph_info
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, HeadInfo, to_json, write_manifest

HIDDEN, HEADS, SIZE, VOCAB = 256, 2, 128, 2000
FEATURES = "features"  # [B, T, H], what the head reads of the target


class Nodes:
    """Nodes and weights of a graph under construction."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, name: str, array: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def matrix(self, name: str, rows: int, columns: int) -> str:
        return self.weight(name, (self.random.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32))

    def node(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or f"value.{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output


def _heads(build: Nodes, features: str, name: str) -> str:
    """[B, T, H] to [B, G, T, D]."""
    product = build.node("MatMul", [features, build.matrix(name, HIDDEN, HEADS * SIZE)])
    split = build.node("Reshape", [product, build.weight(f"{name}.shape", np.array([0, 0, HEADS, SIZE]))])
    return build.node("Transpose", [split], perm=[0, 2, 1, 3])


def _attention(build: Nodes, features: str) -> str:
    """One layer over its own key/value slots."""
    caches = []
    for name, cache in (("key", contract.key_name(0)), ("value", contract.value_name(0))):
        inputs = [cache, _heads(build, features, name), contract.WRITE_INDEX]
        caches.append(build.node("TensorScatter", inputs, contract.updated(cache), axis=2))
    attended = build.node("Attention", [_heads(build, features, "query"), *caches, contract.ATTENTION_MASK])
    joined = build.node("Transpose", [attended], perm=[0, 2, 1, 3])
    flat = build.node("Reshape", [joined, build.weight("flat", np.array([0, 0, HEADS * SIZE]))])
    return build.node("Add", [features, build.node("MatMul", [flat, build.matrix("output", HEADS * SIZE, HIDDEN)])])


def _recurrence(build: Nodes, features: str) -> str:
    """h[row] = a · h[its parent] + x[row], the parents told by the row mask; one state for each row."""
    decay = build.weight("decay", build.random.uniform(0.6, 0.95, HIDDEN).astype(np.float32))
    seen = build.node("Cast", [contract.ROW_MASK], to=TensorProto.FLOAT)  # [B, T, T]
    last = build.weight("last", np.array([-1]))
    depth = build.node("ReduceSum", [seen, last], keepdims=1)  # [B, T, 1]: rows on the path, the row itself included
    distance = build.node("Sub", [depth, build.node("Transpose", [depth], perm=[0, 2, 1])])
    weights = build.node("Pow", [decay, build.node("Unsqueeze", [distance, last])])  # [B, T, T, H]
    weights = build.node("Mul", [weights, build.node("Unsqueeze", [seen, last])])
    one = build.weight("one", np.array([1]))
    terms = build.node("Mul", [weights, build.node("Unsqueeze", [features, one])])
    new = build.node("ReduceSum", [terms, build.weight("two", np.array([2]))], keepdims=0)
    carried = build.node("Mul", [build.node("Pow", [decay, depth]), build.node("Unsqueeze", ["state", one])])
    return build.node("Add", [new, carried], contract.updated("state"))


def state_graph(attention: bool, recurrence: bool) -> Any:
    """An ONNX model: `features` to `logits` [B, T, V] and `hidden` [B, T, H], with the states that are asked for."""
    build = Nodes(seed=7)
    value, hidden = helper.make_tensor_value_info, FEATURES
    inputs = [value(FEATURES, TensorProto.FLOAT, ["batch", "rows", HIDDEN])]
    outputs = []
    if attention:
        inputs += [
            value(contract.ATTENTION_MASK, TensorProto.BOOL, ["batch", 1, "rows", "slots"]),
            value(contract.WRITE_INDEX, TensorProto.INT64, ["batch"]),
        ]
        for cache in (contract.key_name(0), contract.value_name(0)):
            shape = ["batch", HEADS, "slots", SIZE]
            inputs.append(value(cache, TensorProto.FLOAT, shape))
            outputs.append(value(contract.updated(cache), TensorProto.FLOAT, shape))
        hidden = _attention(build, hidden)
    if recurrence:
        inputs.append(value(contract.ROW_MASK, TensorProto.BOOL, ["batch", "rows", "rows"]))
        inputs.append(value("state", TensorProto.FLOAT, ["batch", HIDDEN]))
        outputs.append(value(contract.updated("state"), TensorProto.FLOAT, ["batch", "rows", HIDDEN]))
        hidden = _recurrence(build, hidden)
    build.node("Identity", [hidden], contract.HIDDEN)
    build.node("MatMul", [hidden, build.matrix("lm_head", HIDDEN, VOCAB)], contract.LOGITS)
    outputs += [
        value(contract.LOGITS, TensorProto.FLOAT, ["batch", "rows", VOCAB]),
        value(contract.HIDDEN, TensorProto.FLOAT, ["batch", "rows", HIDDEN]),
    ]
    graph = helper.make_graph(build.nodes, "states", inputs, outputs, build.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", contract.OPSET)], ir_version=11)


def with_head(bundle: Bundle, folder: Path, name: str, attention: bool, recurrence: bool) -> Bundle:
    """A copy of the bundle with such a graph as a draft head."""
    shutil.copytree(bundle.path, folder)
    file = folder / "heads" / name / "head.onnx"
    file.parent.mkdir(parents=True)
    model = state_graph(attention, recurrence)
    onnx.checker.check_model(model)
    onnx.save(model, file)
    info = HeadInfo(
        name=name,
        family="test",
        dialect="test",
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        heads=1,
        top_k=1,
        graph=graph_info(ir.load(file), f"heads/{name}/head.onnx"),
    )
    (file.parent / "head.json").write_text(to_json(info), "utf-8")
    write_manifest(folder, dataclasses.replace(bundle.manifest, heads=(*bundle.manifest.heads, name)))
    return Bundle.load(folder)

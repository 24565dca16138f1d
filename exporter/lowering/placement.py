"""Which nodes of a graph ONNX Runtime's CUDA provider has a kernel for.

A node without one runs on the CPU, with copies to it and back in every step, and no warning. The table in this folder is the
provider's own registry (written by `tests/gpu/kernels.py`); it only grows from one version to the next.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from headstart.exporter.passes.values import operand

TABLE = Path(__file__).with_name("cuda_kernels.json")
NAMES = {"FLOAT": "float", "DOUBLE": "double"}  # where ONNX Runtime's name is not the type's own in lower case
# Functions of ONNX without a kernel of their own: ONNX Runtime decomposes them into operators that have one (as of 1.31.1).
DECOMPOSED = {"GroupNormalization"}
Kernel = tuple[int, int | None, dict[str, list[str]]]  # first and last version of the operator, and the types it takes


@cache
def registry() -> tuple[str, dict[str, list[Kernel]]]:
    """(version of ONNX Runtime, operator -> kernels); operators of a domain are written domain::name."""
    document = json.loads(TABLE.read_text("utf-8"))
    return document["onnxruntime"], document["kernels"]


def left_on_cpu(model: ir.Model) -> list[str]:
    """Nodes of `model` without a kernel, as "name: operator(types)". Arithmetic on shapes is not counted: it belongs there."""
    arithmetic = {id(node) for node in _shape_arithmetic(model)}
    return [_described(node) for node in model.graph if id(node) not in arithmetic and not _has_kernel(node, model)]


def _shape_arithmetic(model: ir.Model) -> Iterator[ir.Node]:
    """Nodes that compute with nothing but sizes of tensors and constants."""
    known: set[int] = set()
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None and not value.is_initializer()]
        if node.op_type == "Shape" or (all(id(value) in known for value in inputs) and _is_integer(node)):
            known.update(id(value) for value in node.outputs)
            yield node


def _is_integer(node: ir.Node) -> bool:
    return all(value.dtype in (ir.DataType.INT64, ir.DataType.INT32) for value in node.outputs)


def _has_kernel(node: ir.Node, model: ir.Model) -> bool:
    if node.op_type in DECOMPOSED:
        return True
    kernels = registry()[1].get(f"{node.domain}::{node.op_type}" if node.domain else node.op_type, [])
    if node.domain:  # its schema is ONNX Runtime's own: the activations' type is the first constraint
        return any(_named(operand(node, 0)) in (types.get("T") or types["T1"]) for _, _, types in kernels)
    schema = onnx.defs.get_schema(node.op_type, model.graph.opset_imports[""], "")
    version, bound = schema.since_version, _bound(node, schema)
    fitting = (types for first, last, types in kernels if first <= version and (last is None or version <= last))
    return any(all(bound.get(name, set()) <= set(allowed) for name, allowed in types.items()) for types in fitting)


def _bound(node: ir.Node, schema: Any) -> dict[str, set[str]]:
    """Type constraint of the operator -> the types it has here."""
    bound: dict[str, set[str]] = {}
    for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            if value is not None and value.dtype is not None:
                bound.setdefault(formals[min(index, len(formals) - 1)].type_str, set()).add(_named(value))
    return bound


def _named(value: ir.Value) -> str:
    return NAMES.get(value.dtype.name, value.dtype.name.lower()) if value.dtype is not None else "unknown"


def _described(node: ir.Node) -> str:
    types = ", ".join(_named(value) for value in node.inputs if value is not None)
    return f"{node.name or node.outputs[0].name}: {node.op_type}({types})"

"""Gemm over a constant matrix becomes MatMul and Add, the form every other pass knows linear layers by."""

import onnx_ir as ir

from .surgery import Writer, clean, constant_of, in_order, replace_value


def split_gemms(model: ir.Model) -> tuple[ir.Model, bool]:
    """Rewrite Gemm nodes that only multiply by a constant and add to it: no scaling, activations not transposed."""
    found = [node for node in in_order(model) if node.op_type == "Gemm" and _is_linear(node)]
    for node in found:
        write = Writer(model, node)
        source, weight = node.inputs[0], node.inputs[1]
        if _attribute(node, "transB", 0):
            weight = write.node("Transpose", [weight], perm=[1, 0])
        product = write.node("MatMul", [source, weight])
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            product = write.node("Add", [product, node.inputs[2]])
        replace_value(node.outputs[0], product)
    if found:
        clean(model)
    return model, bool(found)


def _is_linear(node: ir.Node) -> bool:
    plain = _attribute(node, "alpha", 1.0) == 1.0 and _attribute(node, "beta", 1.0) == 1.0 and not _attribute(node, "transA", 0)
    return plain and constant_of(node.inputs[1]) is not None


def _attribute(node: ir.Node, name: str, default: float) -> float:
    found = node.attributes.get(name)
    return default if found is None else float(found.value)

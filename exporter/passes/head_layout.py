"""Two layouts of heads: [B, H, T, D] of the portable attention, and [B, T, H · D] of ONNX Runtime's fused operators.

Linear layers compute the second: where an attention's inputs were reshaped and transposed from it, nothing is left to do.
"""

import onnx_ir as ir

from .surgery import Writer, producer, replace_value
from .values import operand, shape_of

HEAD_NORMS = ("SimplifiedLayerNormalization", "RMSNormalization", "LayerNormalization")


def flat(write: Writer, value: ir.Value, width: int) -> ir.Value:
    """[B, T, heads · D] of a [B, heads, T, D] value: what it was reshaped from, when that is how it came about."""
    rows_first = _rows_first(write, value)
    reshaped = producer(rows_first, "Reshape")
    source = reshaped.inputs[0] if reshaped is not None else None
    if source is not None and source.shape is not None and len(source.shape) == 3 and source.shape[2] == width:
        return source
    return write.node("Reshape", [rows_first, write.ints([0, 0, width])])


def _rows_first(write: Writer, value: ir.Value) -> ir.Value:
    """[B, T, heads, D] of a [B, heads, T, D] value: what was transposed to it, or to the input of the norm that gave it."""
    node = value.producer()
    if node is not None and _is_transpose(node):
        return operand(node, 0)
    transpose = operand(node, 0).producer() if node is not None and _is_head_norm(node) else None
    if node is None or transpose is None or not _is_transpose(transpose):
        return write.node("Transpose", [value], perm=[0, 2, 1, 3])
    inputs = [transpose.inputs[0], *node.inputs[1:]]
    return write.node(node.op_type, inputs, node.domain, **node.attributes)


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].value) == [0, 2, 1, 3]


def _is_head_norm(node: ir.Node) -> bool:
    """It normalises the last axis alone, so the order of the others does not matter to it."""
    axis = node.attributes.get("axis")
    return node.op_type in HEAD_NORMS and (axis is None or axis.value == -1)


def replace_heads(write: Writer, old: ir.Value, new: ir.Value, heads: int, size: int) -> None:
    """Let readers of the portable [B, H, T, D] output read the fused operator's [B, T, H · D]."""
    new.shape = ir.Shape([shape_of(old)[0], shape_of(old)[2], heads * size])
    new.type = old.type
    for node, _ in list(old.uses()):
        flat = _flattened(node, heads * size)
        if flat is not None:
            replace_value(flat, new)
    if old.uses():
        split = write.node("Reshape", [new, write.ints([0, 0, heads, size])])
        replace_value(old, write.node("Transpose", [split], perm=[0, 2, 1, 3]))


def _flattened(transpose: ir.Node, width: int) -> ir.Value | None:
    """The output of the Transpose and Reshape that turn an attention's output into [B, T, H · D]."""
    if not _is_transpose(transpose):
        return None
    for node, _ in transpose.outputs[0].uses():
        out = node.outputs[0]
        if node.op_type == "Reshape" and out.shape is not None and len(out.shape) == 3 and out.shape[2] == width:
            return out
    return None

"""A batch's attention gets one query row more than it has, so that a single row is summed as several are.

ONNX Runtime multiplies one row by another kernel than two or more; the last bits differ (3e-7 to 1e-6), and rounding to
integers turns that into other tokens. Plain decoding (one row) must equal a verify pass (several). Linear layers of a batch
have a row per sequence, at least two; only attention multiplies each sequence's rows alone. Heads that share a key/value head
need nothing once they are folded (`fold_grouped_heads`): they are rows of one product.
"""

from typing import Any

import onnx_ir as ir

from .surgery import Writer, constant_of, in_order, replace_value
from .values import operand

SLOT_AXES = 4  # of a product of attention: [B, H, T, D] by [B, G, D, S]


def pad_query_rows(model: Any) -> tuple[Any, bool]:
    """Pad every Attention with a query head per key/value head, and every product of decomposed attention."""
    masks: dict[int, Any] = {}
    changed = False
    for node in in_order(model):
        if node.op_type == "Attention" and _heads(node, 0) is not None and _heads(node, 0) == _heads(node, 1):
            _pad_attention(Writer(model, node), node, masks)
            changed = True
        elif node.op_type == "MatMul" and node.domain == "" and _is_attention(node):
            _pad_product(Writer(model, node), node)
            changed = True
    return model, changed


def _heads(node: ir.Node, index: int) -> Any:
    """Of the query or the keys, [B, heads, …]; None where the graph does not state them."""
    shape = operand(node, index).shape
    return None if shape is None else shape[1]


def _is_attention(node: Any) -> bool:
    """A product of two computed values with heads, scores or the values they weigh."""
    left, right = node.inputs
    return left.shape is not None and len(left.shape) == SLOT_AXES and constant_of(right) is None


def _pad_attention(write: Writer, node: Any, masks: dict[int, Any]) -> None:
    query, keys, values, *rest = node.inputs
    inputs = [_padded(write, query), keys, values]
    if rest and rest[0] is not None:
        mask = rest[0]
        if id(mask) not in masks:
            same_rows = mask.shape is None or mask.shape[2] == query.shape[2]  # else one row for all of them
            masks[id(mask)] = _padded(write, mask) if same_rows else mask
        inputs.append(masks[id(mask)])
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    padded = write.node("Attention", inputs, **attributes)
    padded.dtype = node.outputs[0].dtype
    replace_value(node.outputs[0], _without_last(write, padded))


def _pad_product(write: Writer, node: Any) -> None:
    padded = write.node("MatMul", [_padded(write, node.inputs[0]), node.inputs[1]])
    padded.dtype = node.outputs[0].dtype
    replace_value(node.outputs[0], _without_last(write, padded))


def _padded(write: Writer, value: Any) -> Any:
    """[…, T, N] with the last row twice."""
    last = write.node("Slice", [value, write.ints([-1]), write.ints([2**31]), write.ints([2])])
    padded = write.node("Concat", [value, last], axis=2)
    last.dtype = padded.dtype = value.dtype
    return padded


def _without_last(write: Writer, value: Any) -> Any:
    return write.node("Slice", [value, write.ints([0]), write.ints([-1]), write.ints([2])])

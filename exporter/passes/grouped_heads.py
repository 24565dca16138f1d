"""Query heads that share a key/value head become rows of that head: [B, H, T, D] is read as [B, G, H/G · T, D].

Read from the plans of TensorRT-RTX 1.7.1: its fused attention requires one key/value head for each query head, and copies
the whole cache into that form before every layer, H/G times its size. Folded, it needs as many heads as the cache has, and the
mask, which is small where few rows are verified, is repeated instead.
"""

import onnx_ir as ir

from .surgery import Writer, clean, in_order, replace_value
from .values import operand, shape_of, size_of


def fold_grouped_heads(model: ir.Model) -> tuple[ir.Model, bool]:
    """Rewrite every Attention with grouped heads. Returns (model, whether anything changed)."""
    found = [node for node in in_order(model) if node.op_type == "Attention" and _group(node) > 1]
    masks: dict[tuple[int, int], ir.Value] = {}
    for node in found:
        _fold(Writer(model, node), node, masks)
    if found:
        clean(model)
    return model, bool(found)


def _group(node: ir.Node) -> int:
    """Query heads per key/value head; 1 where a size is not known."""
    heads, kv_heads = (shape_of(operand(node, index))[1] for index in (0, 1))
    return heads // kv_heads if isinstance(heads, int) and isinstance(kv_heads, int) else 1


def _fold(write: Writer, node: ir.Node, masks: dict[tuple[int, int], ir.Value]) -> None:
    query, keys, values, mask = (operand(node, index) for index in range(4))
    group, heads, kv_heads, size = _group(node), size_of(query, 1), size_of(keys, 1), size_of(values, 3)
    if (id(mask), group) not in masks:
        masks[id(mask), group] = _folded_mask(write, mask, group, kv_heads)
    folded = write.node("Reshape", [query, write.ints([0, kv_heads, -1, size_of(query, 3)])])
    folded.type = query.type
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attended = write.node("Attention", [folded, keys, values, masks[id(mask), group]], **attributes)
    attended.type = query.type
    replace_value(node.outputs[0], write.node("Reshape", [attended, write.ints([0, heads, -1, size])]))


def _folded_mask(write: Writer, mask: ir.Value, group: int, kv_heads: int) -> ir.Value:
    """[B, 1, group · T, S], one copy for each head of a group; a mask of every head's own is read as [B, G, group · T, S]."""
    if shape_of(mask)[1] == 1:
        folded = write.node("Concat", [mask] * group, axis=2)
    else:
        slots = write.node("Shape", [mask], start=3, end=4)
        shape = write.node("Concat", [write.ints([0, kv_heads, -1]), slots], axis=0)
        folded = write.node("Reshape", [mask, shape])
    folded.type = mask.type
    return folded

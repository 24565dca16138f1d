"""Query heads that share a key/value head become rows of that head: [B, H, T, D] is read as [B, G, H/G · T, D].

Read from the plans of TensorRT-RTX 1.7.1: its fused attention wants one key/value head for each query head, and writes the
whole cache anew in that form before every layer, H/G times its size. Folded, it needs as many heads as the cache has, and the
mask, which is small where few rows are verified, is repeated instead.
"""

from typing import Any

from .surgery import Writer, clean, in_order, replace_value


def fold_grouped_heads(model: Any) -> tuple[Any, bool]:
    """Rewrite every Attention with grouped heads. Returns (model, whether anything changed)."""
    found = [node for node in in_order(model) if node.op_type == "Attention" and _group(node) > 1]
    masks: dict[tuple[int, int], Any] = {}
    for node in found:
        _fold(Writer(model, node), node, masks)
    if found:
        clean(model)
    return model, bool(found)


def _group(node: Any) -> int:
    """Query heads per key/value head; 1 where a size is not known."""
    heads, kv_heads = node.inputs[0].shape[1], node.inputs[1].shape[1]
    return heads // kv_heads if isinstance(heads, int) and isinstance(kv_heads, int) else 1


def _fold(write: Writer, node: Any, masks: dict[tuple[int, int], Any]) -> None:
    query, keys, values, mask = node.inputs
    group, (heads, size), kv_heads = _group(node), (query.shape[1], values.shape[3]), keys.shape[1]
    if (id(mask), group) not in masks:
        masks[id(mask), group] = _folded_mask(write, mask, group, kv_heads)
    folded = write.node("Reshape", [query, write.ints([0, kv_heads, -1, query.shape[3]])])
    folded.dtype = query.dtype
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attended = write.node("Attention", [folded, keys, values, masks[id(mask), group]], **attributes)
    attended.dtype = query.dtype
    replace_value(node.outputs[0], write.node("Reshape", [attended, write.ints([0, heads, -1, size])]))


def _folded_mask(write: Writer, mask: Any, group: int, kv_heads: int) -> Any:
    """[B, 1, group · T, S], one copy for each head of a group; a mask of every head's own is read as [B, G, group · T, S]."""
    if mask.shape[1] == 1:
        folded = write.node("Concat", [mask] * group, axis=2)
    else:
        slots = write.node("Shape", [mask], start=3, end=4)
        shape = write.node("Concat", [write.ints([0, kv_heads, -1]), slots], axis=0)
        folded = write.node("Reshape", [mask, shape])
    folded.dtype = mask.dtype
    return folded

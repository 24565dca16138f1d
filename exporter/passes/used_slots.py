"""Attention reads the used part of the caches: as many slots as the mask has columns, not the whole capacity.

The portable TensorScatter + Attention scores every slot of the cache. Here the mask's last axis becomes a size of its own,
1 … S, which the runtime rounds up from the longest sequence; the updated caches are cut to it before anything reads them.
Slots beyond it are not visible to any row, so the result is the same. With a mask of all S columns nothing is cut.
"""

from typing import Any

import onnx_ir as ir

from headstart.runtime import contract

from .surgery import Writer, clean, in_order
from .values import operand


def read_used_slots(model: Any) -> tuple[Any, bool]:
    """Cut every updated cache to the mask's columns. Returns (model, whether anything changed)."""
    inputs = {value.name: value for value in model.graph.inputs}
    mask = inputs.get(contract.ATTENTION_MASK)
    scatters = [node for node in in_order(model) if node.op_type == "TensorScatter" and operand(node, 0).is_graph_input()]
    if mask is None:
        return model, False
    capacity = mask.shape[3]
    first = next(iter(model.graph))
    used = Writer(model, first).node("Shape", [mask], start=3, end=4)
    _measure_mask(model, used)
    for scatter in scatters:
        _cut(model, scatter, used)
    _rename(model, mask, capacity)
    clean(model)
    return model, True


def _measure_mask(model: Any, used: Any) -> None:
    """The number of slots, wherever it is computed with (windows, relative positions), is the mask's columns."""
    for node in in_order(model):
        if node.op_type == "Shape" and node.outputs[0] is not used and _is_slots(node):
            ir.convenience.replace_all_uses_with(node.outputs[0], used)


def _is_slots(node: Any) -> bool:
    cache = node.inputs[0]
    axes = [int(node.attributes[name].value) if name in node.attributes else None for name in ("start", "end")]
    return bool(cache.is_graph_input() and cache.name.startswith(_CACHES) and axes == [2, 3])


_CACHES = (contract.key_name(0)[:-1], contract.value_name(0)[:-1])


def _cut(model: Any, scatter: Any, used: Any) -> None:
    """Readers of the updated cache get its first slots; the graph's output stays whole."""
    updated = scatter.outputs[0]
    readers = [(node, index) for node, index in updated.uses()]
    if not readers:
        return
    write = Writer(model, scatter)
    bounds = [write.ints([0]), used, write.ints([2])]
    cut = ir.node("Slice", [updated, *bounds])
    model.graph.insert_after(scatter, cut)
    cut.outputs[0].dtype = updated.dtype
    for node, index in readers:
        node.replace_input_with(index, cut.outputs[0])


def _rename(model: Any, mask: Any, capacity: Any) -> None:
    """Give the mask's columns their own name; sizes inferred from the old one are dropped, for they would be read as equal."""
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and capacity in tuple(value.shape) and not value.is_graph_output():
                value.shape = None
    mask.shape = ir.Shape([*mask.shape[:3], contract.USED_SLOTS])

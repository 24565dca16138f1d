"""TensorScatter of whole numbers becomes ScatterElements.

Sliding windows keep the position of each slot in a small table, which is written like a cache. TensorRT updates caches of
floats only, and would otherwise refuse the node.
"""

from typing import Any

import onnx_ir as ir

from .surgery import Writer, clean, in_order, put_in_place

WHOLE = (ir.DataType.INT64, ir.DataType.INT32)


def scatter_whole_numbers(model: Any) -> tuple[Any, bool]:
    """Rewrite each one over [B, 1, S, 1] values. Returns (model, whether anything changed)."""
    found = [node for node in in_order(model) if node.op_type == "TensorScatter" and node.inputs[0].dtype in WHOLE]
    for node in found:
        write = Writer(model, node)
        table, new, write_index = node.inputs
        flat = [write.node("Reshape", [value, write.ints([0, -1])]) for value in (table, new)]  # [B, S], [B, T]
        rows = write.node("Squeeze", [write.node("Shape", [flat[1]], start=1, end=2), write.ints([0])])
        zero, one = (write.node("Squeeze", [write.ints([number]), write.ints([0])]) for number in (0, 1))
        offsets = write.node("Range", [zero, rows, one])
        slots = write.node("Add", [write.node("Unsqueeze", [write_index, write.ints([1])]), offsets])  # [B, T]
        written = write.node("ScatterElements", [flat[0], slots, flat[1]], axis=1)
        put_in_place(node.outputs[0], write.node("Unsqueeze", [written, write.ints([1, 3])]))
    if found:
        clean(model)
    return model, bool(found)

"""TensorScatter becomes ScatterElements, where a builder has no cache update for it.

1. Sliding windows keep the position of each slot in a table of integers, which is written like a cache; TensorRT updates
   caches of floats only, and would refuse the node.
2. TensorRT before its KV-cache layers (JetPack 6) has no such update at all. The caches then come back as copies.
"""

import onnx_ir as ir

from .surgery import Writer, clean, in_order, replace_value
from .values import operand

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def scatter_elements(model: ir.Model, floats: bool = False) -> tuple[ir.Model, bool]:
    """Rewrite the scatters of integers, and with `floats` all others. Returns (model, whether anything changed)."""
    found = [n for n in in_order(model) if n.op_type == "TensorScatter" and (floats or operand(n, 0).dtype not in FLOATS)]
    for node in found:
        cache, new, write_index = (operand(node, index) for index in range(3))  # [B, G, S, D], [B, G, T, D], [B]
        write = Writer(model, node)
        rows = write.node("Squeeze", [write.node("Shape", [new], start=2, end=3), write.ints([0])])
        zero, one = (write.node("Squeeze", [write.ints([number]), write.ints([0])]) for number in (0, 1))
        offsets = write.node("Range", [zero, rows, one])
        first = write.node("Unsqueeze", [write_index, write.ints([1])])
        slots = write.node("Unsqueeze", [write.node("Add", [first, offsets]), write.ints([1, 3])])  # [B, 1, T, 1]
        everywhere = write.node("Expand", [slots, write.node("Shape", [new])])
        written = write.node("ScatterElements", [cache, everywhere, new], axis=2)
        written.type = cache.type
        replace_value(node.outputs[0], written)
    if found:
        clean(model)
    return model, bool(found)

"""An 8-bit embedding table is dequantized before the lookup.

The canonical graph looks up integers and scales and multiplies them, which costs a CPU the least. TensorRT takes integers only
as the input of a DequantizeLinear; it fuses that with the lookup that follows, so that the table stays in 8 bits.
"""

import onnx_ir as ir

from .surgery import Writer, clean, in_order, only_user, producer, replace_value
from .values import operand


def dequantize_tables(model: ir.Model) -> tuple[ir.Model, bool]:
    """Rewrite Gather(values) · Gather(scales) as Gather(DequantizeLinear(values, scales))."""
    found = [pair for node in in_order(model) if (pair := _lookup(node)) is not None]
    for gather, product, scales in found:
        write = Writer(model, gather)
        table = write.node("DequantizeLinear", [gather.inputs[0], scales], axis=0)
        table.shape, table.type = operand(gather, 0).shape, scales.type
        rows = write.node("Gather", [table, gather.inputs[1]], axis=0)
        rows.type = scales.type
        replace_value(product.outputs[0], rows)
    if found:
        clean(model)
    return model, bool(found)


def _lookup(gather: ir.Node) -> tuple[ir.Node, ir.Node, ir.Value] | None:
    """(Gather of integers, the Mul that scales them, the initializer of the scales [V])."""
    if gather.op_type != "Gather" or not operand(gather, 0).is_initializer() or operand(gather, 0).dtype != ir.DataType.INT8:
        return None
    cast = only_user(gather.outputs[0])
    product = only_user(cast.outputs[0]) if cast is not None and cast.op_type == "Cast" else None
    if product is None or product.op_type != "Mul":
        return None
    scale = producer(product.inputs[1], "Unsqueeze") or producer(product.inputs[0], "Unsqueeze")
    lookup = producer(scale.inputs[0], "Gather") if scale is not None else None
    return None if lookup is None else (gather, product, operand(lookup, 0))

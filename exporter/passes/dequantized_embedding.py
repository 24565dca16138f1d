"""An 8-bit embedding table is dequantized first and looked up then.

The canonical graph looks up whole numbers and scales and multiplies them, which costs a CPU the least. TensorRT takes whole
numbers only in front of a DequantizeLinear; it fuses that with the lookup behind it, so that the table stays in 8 bits.
"""

from typing import Any

from .surgery import Writer, clean, in_order, only_user, producer, replace_value


def dequantize_tables(model: Any) -> tuple[Any, bool]:
    """Rewrite Gather(values) · Gather(scales) as Gather(DequantizeLinear(values, scales))."""
    found = [pair for node in in_order(model) if (pair := _lookup(node)) is not None]
    for gather, product, scales in found:
        write = Writer(model, gather)
        table = write.node("DequantizeLinear", [gather.inputs[0], scales], axis=0)
        table.shape, table.dtype = gather.inputs[0].shape, scales.dtype
        rows = write.node("Gather", [table, gather.inputs[1]], axis=0)
        rows.dtype = scales.dtype
        replace_value(product.outputs[0], rows)
    if found:
        clean(model)
    return model, bool(found)


def _lookup(gather: Any) -> tuple[Any, Any, Any] | None:
    """(Gather of whole numbers, the Mul that scales them, the initializer of the scales [V])."""
    if gather.op_type != "Gather" or not gather.inputs[0].is_initializer() or gather.inputs[0].dtype.name != "INT8":
        return None
    cast = only_user(gather.outputs[0])
    product = only_user(cast.outputs[0]) if cast is not None and cast.op_type == "Cast" else None
    if product is None or product.op_type != "Mul":
        return None
    scale = producer(product.inputs[1], "Unsqueeze") or producer(product.inputs[0], "Unsqueeze")
    lookup = producer(scale.inputs[0], "Gather") if scale is not None else None
    return None if lookup is None else (gather, product, lookup.inputs[0])

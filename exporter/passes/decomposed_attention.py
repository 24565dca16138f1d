"""Attention becomes MatMul, Add, Softmax and MatMul, for builders that have no layer of that name (TensorRT of JetPack 6).

Its mask must be numbers and its heads ungrouped (`additive_mask`, `grouped_heads`). The softmax sums in float32.
"""

import numpy as np
import onnx_ir as ir

from .half import NUMPY_TYPES
from .surgery import Writer, clean, in_order, replace_value
from .values import dtype_of, operand


def decompose_attention(model: ir.Model) -> tuple[ir.Model, bool]:
    """Rewrite every Attention. Returns (model, whether anything changed)."""
    found = [node for node in in_order(model) if node.op_type == "Attention"]
    for node in found:
        query, keys, values, *masks = node.inputs  # an encoder of whole windows has no mask
        write, dtype, scale = Writer(model, node), dtype_of(operand(node, 0)), node.attributes["scale"].value
        factor = write.constant(f"scale_{scale:.9g}.{dtype.name.lower()}", np.full((), scale, NUMPY_TYPES[dtype]))
        turned = write.node("Transpose", [keys], perm=[0, 1, 3, 2])
        scores = write.node("MatMul", [write.node("Mul", [query, factor]), turned])
        for mask in masks:
            scores = write.node("Add", [scores, mask])
        wide = write.node("Softmax", [write.node("Cast", [scores], to=int(ir.DataType.FLOAT))], axis=-1)
        attended = write.node("MatMul", [write.node("Cast", [wide], to=int(dtype)), values])
        attended.dtype = dtype
        replace_value(node.outputs[0], attended)
    if found:
        clean(model)
    return model, bool(found)

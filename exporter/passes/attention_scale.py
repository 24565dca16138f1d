"""Attention of scale 1 becomes attention of scale 1/2 over doubled queries: the same numbers, to the last bit.

Read from the plans of TensorRT-RTX 1.7.1: where the scale is 1 (OPT, Granite), its compiler copies the whole key cache before
it updates it; with any other scale it updates the cache in place.
"""

import numpy as np
import onnx_ir as ir

from .half import NUMPY_TYPES
from .surgery import Writer, in_order
from .values import dtype_of, operand


def avoid_unit_scale(model: ir.Model) -> tuple[ir.Model, bool]:
    """Rewrite every Attention of scale 1. Returns (model, whether anything changed)."""
    changed = False
    for node in in_order(model):
        scale = node.attributes.get("scale")
        if node.op_type != "Attention" or scale is None or float(scale.value) != 1.0:
            continue
        query, dtype = operand(node, 0), dtype_of(operand(node, 0))
        write = Writer(model, node)
        two = write.constant(f"two.{dtype.name.lower()}", np.full((), 2, NUMPY_TYPES[dtype]))
        doubled = write.node("Mul", [query, two])
        doubled.dtype, doubled.shape = dtype, query.shape
        node.replace_input_with(0, doubled)
        node.attributes["scale"] = ir.AttrFloat32("scale", 0.5)
        changed = True
    return model, changed

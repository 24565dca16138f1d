"""Boolean attention masks become numbers that are added to the scores, each once for all layers that read it.

A builder that gets a boolean mask converts it itself, in every layer: TensorRT-RTX 1.7.1 adds about 1 MB of kernels for that.
"""

import numpy as np
import onnx_ir as ir

from .half import NUMPY_TYPES
from .surgery import Writer, in_order
from .values import dtype_of, operand

MASKED = -30000.0  # its exponential is zero, and a score added to it stays inside float16's range


def add_masks(model: ir.Model) -> tuple[ir.Model, bool]:
    """Give every Attention a mask of the type it computes in. Returns (model, whether anything changed)."""
    added: dict[tuple[int, ir.DataType], ir.Value] = {}
    for node in in_order(model):
        if node.op_type != "Attention" or len(node.inputs) < 4 or node.inputs[3] is None:
            continue
        mask, dtype = operand(node, 3), dtype_of(operand(node, 0))
        if mask.dtype != ir.DataType.BOOL:
            continue
        key = (id(mask), dtype)
        if key not in added:
            write, kind = Writer(model, node), dtype.name.lower()
            zero = write.constant(f"mask.seen.{kind}", np.zeros((), NUMPY_TYPES[dtype]))
            masked = write.constant(f"mask.unseen.{kind}", np.full((), MASKED, NUMPY_TYPES[dtype]))
            added[key] = write.node("Where", [mask, zero, masked])
            added[key].dtype, added[key].shape = dtype, mask.shape
        node.replace_input_with(3, added[key])
    return model, bool(added)

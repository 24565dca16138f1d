"""Boolean attention masks become numbers that are added to the scores, each once for all layers that read it.

A builder that gets a boolean mask converts it itself, in every layer: TensorRT-RTX 1.7.1 adds about 1 MB of kernels for that.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from .half import NUMPY_TYPES
from .surgery import Writer, in_order

MASKED = -30000.0  # its exponential is zero, and a score added to it stays inside float16's range


def add_masks(model: Any) -> tuple[Any, bool]:
    """Give every Attention a mask of the type it computes in. Returns (model, whether anything changed)."""
    made: dict[tuple[int, Any], Any] = {}
    for node in in_order(model):
        if node.op_type != "Attention" or len(node.inputs) < 4 or node.inputs[3] is None:
            continue
        mask, dtype = node.inputs[3], node.inputs[0].dtype
        if mask.dtype != ir.DataType.BOOL:
            continue
        key = (id(mask), dtype)
        if key not in made:
            write, kind = Writer(model, node), dtype.name.lower()
            zero = write.constant(f"mask.seen.{kind}", np.zeros((), NUMPY_TYPES[dtype]))
            masked = write.constant(f"mask.unseen.{kind}", np.full((), MASKED, NUMPY_TYPES[dtype]))
            made[key] = write.node("Where", [mask, zero, masked])
            made[key].dtype, made[key].shape = dtype, mask.shape
        node.replace_input_with(3, made[key])
    return model, bool(made)

"""The best token of every chosen row by ArgMax, for providers whose ArgMax takes the first of equals, as ONNX specifies.

ONNX Runtime's CUDA provider does it with a kernel of its own for float32 and float16; its ReduceMax would need cuDNN.
"""

from collections.abc import Sequence

import onnx_ir as ir

from headstart.runtime import contract

from .values import shape_of


def add_argmax(model: ir.Model) -> tuple[ir.Model, bool]:
    """Give a decoder the output `best_ids` [B, R] int32. Returns (model, whether anything changed): others have no logits."""
    logits = next((value for value in model.graph.outputs if value.name == contract.LOGITS), None)
    if logits is None:
        return model, False
    source = logits
    if logits.dtype == ir.DataType.BFLOAT16:  # exact, and order is all that matters
        source = _added(model, "Cast", logits, ir.DataType.FLOAT, list(shape_of(logits)), to=int(ir.DataType.FLOAT))
    shape = list(shape_of(logits))[:2]
    best = _added(model, "ArgMax", source, ir.DataType.INT64, shape, axis=-1, keepdims=0)
    narrow = _added(model, "Cast", best, ir.DataType.INT32, shape, to=int(ir.DataType.INT32))
    narrow.name = contract.BEST_IDS
    model.graph.outputs.append(narrow)
    return model, True


def _added(
    model: ir.Model, op: str, source: ir.Value, dtype: ir.DataType, shape: Sequence[int | ir.SymbolicDim], **attributes: int
) -> ir.Value:
    node = ir.node(op, [source], attributes=attributes)
    model.graph.append(node)
    out = node.outputs[0]
    out.dtype, out.shape = dtype, ir.Shape(shape)
    return out

"""The best token of every chosen row, computed together with the logits: greedy decoding then fetches one number a row.

Equal logits are common in half precision, and TensorRT's argmax does not specify which of them it takes; so the graph computes
the lowest token explicitly: the smallest index whose logit equals the row's maximum, as numpy's argmax does.
"""

import numpy as np
import onnx_ir as ir

from headstart.runtime import contract

from .surgery import Writer
from .values import shape_of, size_of


def add_best_tokens(model: ir.Model) -> tuple[ir.Model, bool]:
    """Give a decoder the output `best_ids` [B, R] int32. Returns (model, whether anything changed): others have no logits."""
    logits = next((value for value in model.graph.outputs if value.name == contract.LOGITS), None)
    if logits is None:
        return model, False
    vocab_size = size_of(logits, 2)
    write = Writer(model, None)
    axis = write.ints([-1])
    highest = write.node("ReduceMax", [logits, axis], keepdims=1)
    highest.type = logits.type
    # A row without a highest (all of it is no number) gets the last token: still one that exists.
    tokens = write.constant("tokens", np.arange(vocab_size, dtype=np.int32))
    last = write.constant("last_token", np.array(vocab_size - 1, np.int32))
    best = write.node("Where", [write.node("Equal", [logits, highest]), tokens, last])
    lowest = write.node("ReduceMin", [best, axis], keepdims=0)
    lowest.name, lowest.type = contract.BEST_IDS, ir.TensorType(ir.DataType.INT32)
    lowest.shape = ir.Shape(shape_of(logits)[:2])
    model.graph.outputs.append(lowest)
    return model, True

"""The best token of every chosen row, computed beside the logits: greedy decoding then fetches one number a row.

Equal logits are common in half precision, and an argmax says not which of them it takes; so the lowest token is asked for in
so many words: the smallest index whose logit equals the row's maximum, as numpy's argmax does.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from headstart.runtime import contract

from .surgery import Writer


def add_best_tokens(model: Any) -> tuple[Any, bool]:
    """Give a decoder the output `best_ids` [B, R] int32. Returns (model, whether anything changed): others have no logits."""
    logits = next((value for value in model.graph.outputs if value.name == contract.LOGITS), None)
    if logits is None:
        return model, False
    vocab_size = int(logits.shape[2])
    write = Writer(model, None)
    axis = write.ints([-1])
    highest = write.node("ReduceMax", [logits, axis], keepdims=1)
    highest.dtype = logits.dtype
    # A row without a highest (all of it is no number) gets the last token: still one that exists.
    tokens = write.constant("tokens", np.arange(vocab_size, dtype=np.int32))
    last = write.constant("last_token", np.array(vocab_size - 1, np.int32))
    best = write.node("Where", [write.node("Equal", [logits, highest]), tokens, last])
    lowest = write.node("ReduceMin", [best, axis], keepdims=0)
    lowest.name, lowest.type = contract.BEST_IDS, ir.TensorType(ir.DataType.INT32)
    lowest.shape = ir.Shape(logits.shape[:2])
    model.graph.outputs.append(lowest)
    return model, True

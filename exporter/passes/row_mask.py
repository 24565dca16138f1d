"""The attention mask [B, 1, T, S] is computed in the graph, from [B, T, T]: which of the new rows each new row sees.

A row sees every slot before `write_index`, and of the slots from there on those of the rows that it may see. The mask grows
with the cache, the rows do not: this keeps the copy to a device small. Sliding windows cut theirs out of it as before.
"""

import numpy as np
import onnx_ir as ir

from headstart.runtime import contract

from .half import NUMPY_TYPES
from .surgery import Writer
from .values import dtype_of, shape_of


def mask_from_rows(model: ir.Model, slots: int) -> tuple[ir.Model, bool]:
    """Replace the input `attention_mask` by `row_mask`. Returns (model, whether anything changed).

    The rows' part is moved to the slots after the history by a product with zeros and ones, of which at most one is a one:
    exact in any type, and every builder has products. No row's mask may be empty.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    mask = inputs.get(contract.ATTENTION_MASK)
    if mask is None:
        return model, False
    batch, _, rows, _ = shape_of(mask)
    row_mask = ir.Value(name=contract.ROW_MASK, shape=ir.Shape([batch, rows, rows]), type=ir.TensorType(ir.DataType.BOOL))
    kind = next(dtype_of(value) for value in model.graph.outputs if value.name == contract.LOGITS)
    write = Writer(model, model.graph[0])
    one = write.constant(f"one.{kind.name.lower()}", np.ones((), NUMPY_TYPES[kind]))
    slot = write.constant("slots", np.arange(slots, dtype=np.int64)[None, None])  # [1, 1, S]
    offset = write.node("Sub", [slot, write.node("Unsqueeze", [inputs[contract.WRITE_INDEX], write.ints([1, 2])])])  # [B, 1, S]
    history = write.node("Less", [offset, write.constant("zero", np.zeros((), np.int64))])
    count = write.node("Squeeze", [write.node("Shape", [row_mask], start=1, end=2), write.ints([0])])
    zero, step = (write.constant(name, np.array(number, np.int64)) for name, number in (("zero", 0), ("step", 1)))
    row = write.node("Unsqueeze", [write.node("Range", [zero, count, step]), write.ints([0, 2])])  # [1, T, 1]
    placed = _cast(write, write.node("Equal", [offset, row]), kind)  # [B, T, S]: whether slot s is new row t's
    seen = write.node("MatMul", [_cast(write, row_mask, kind), placed])
    seen.dtype = kind
    whole = write.node("Or", [history, write.node("Equal", [seen, one])])
    computed = write.node("Unsqueeze", [whole, write.ints([1])])
    computed.dtype, computed.shape = ir.DataType.BOOL, ir.Shape([batch, 1, rows, slots])
    ir.convenience.replace_all_uses_with(mask, computed)
    model.graph.inputs[list(model.graph.inputs).index(mask)] = row_mask
    return model, True


def _cast(write: Writer, value: ir.Value, kind: ir.DataType) -> ir.Value:
    cast = write.node("Cast", [value], to=int(kind))
    cast.dtype = kind
    return cast

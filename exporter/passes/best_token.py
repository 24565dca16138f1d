"""The decoder also says which token of each chosen row has the highest logit: greedy decoding then fetches no logits."""

from typing import Any

import onnx_ir as ir

from headstart.runtime import contract


def add_best(model: Any) -> tuple[Any, bool]:
    """Add the output `best` [B, R] to a decoder. Returns (model, whether anything changed)."""
    logits = next((value for value in model.graph.outputs if value.name == contract.LOGITS), None)
    if logits is None:
        return model, False
    nodes, source = [], logits
    if logits.dtype == ir.DataType.BFLOAT16:  # for which ONNX has no ArgMax
        nodes.append(ir.node("Cast", [logits], attributes={"to": int(ir.DataType.FLOAT)}))
        source = nodes[-1].outputs[0]
        source.dtype, source.shape = ir.DataType.FLOAT, logits.shape
    nodes.append(ir.node("ArgMax", [source], attributes={"axis": -1, "keepdims": 0}))
    best = nodes[-1].outputs[0]
    best.name, best.dtype, best.shape = contract.BEST, ir.DataType.INT64, ir.Shape(list(logits.shape)[:2])
    model.graph.extend(nodes)
    model.graph.outputs.append(best)
    return model, True

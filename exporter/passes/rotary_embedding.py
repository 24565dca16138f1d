"""x · cos + concat(-x[half:], x[:half]) · sin becomes ONNX's RotaryEmbedding: one operator instead of seven."""

import onnx_ir as ir

from .rotary import match_rotary, rotary_table
from .surgery import Writer, clean, in_order, replace_value
from .values import size_of

PROBED = 16  # positions at which both halves of the cosines are compared


def fuse_rotary(model: ir.Model) -> tuple[ir.Model, bool]:
    """Rewrite every rotary embedding whose cosines and sines repeat their first half in the second."""
    halves: dict[int, ir.Value | None] = {}
    changed = False
    for node in in_order(model):
        rotary = match_rotary(node.outputs[0]) if node.op_type == "Add" else None
        if rotary is None:
            continue
        tables = [_half(model, value, halves) for value in (rotary.cos, rotary.sin)]
        if None in tables:
            continue
        replace_value(node.outputs[0], Writer(model, node).node("RotaryEmbedding", [rotary.source, *tables]))
        changed = True
    clean(model)
    return model, changed


def _half(model: ir.Model, value: ir.Value, known: dict[int, ir.Value | None]) -> ir.Value | None:
    """[B, T, D/2] of [B, T, D]; None where the second half is another one, or where more than positions decides."""
    if id(value) not in known:
        known[id(value)] = _first_half(model, value) if rotary_table(model, value, PROBED) is not None else None
    return known[id(value)]


def _first_half(model: ir.Model, value: ir.Value) -> ir.Value:
    reader = next(node for node, _ in value.uses())
    write = Writer(model, reader)
    return write.node("Slice", [value, write.ints([0]), write.ints([size_of(value, -1) // 2]), write.ints([-1])])

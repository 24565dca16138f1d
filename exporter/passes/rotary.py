"""Match rotary embeddings, and tabulate their cosines and sines over all positions.

A rotary embedding is traced as  x · cos + concat(-x[half:], x[:half]) · sin,  with cos and sin computed from the positions
in whatever way the checkpoint asks for (scaled frequencies, attention factors). That computation is not matched but run: the
part of the graph between `position_ids` and the cosines is evaluated over all positions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.runtime import contract

from .surgery import integers, part_in_memory, producer
from .values import name_of, operand, size_of


@dataclass(frozen=True)
class Rotary:
    """`source` [B, heads, T, D] before rotation, and the [B, T, D'] cosines and sines; D' < D where only a part is rotated."""

    source: ir.Value
    cos: ir.Value
    sin: ir.Value


def match_rotary(value: ir.Value) -> Rotary | None:
    """The rotary embedding that computes `value` [B, heads, T, D]; None for any other computation."""
    joined = producer(value, "Concat")
    if joined is None:
        return _match_full(value)
    if len(joined.inputs) != 2:
        return None
    inner, rest = _match_full(operand(joined, 0)), producer(joined.inputs[1], "Slice")
    turned = producer(inner.source, "Slice") if inner is not None else None
    if inner is None or rest is None or turned is None or turned.inputs[0] is not rest.inputs[0]:
        return None
    return Rotary(operand(rest, 0), inner.cos, inner.sin)


def _match_full(value: ir.Value) -> Rotary | None:
    add = producer(value, "Add")
    factors = [producer(v, "Mul") for v in add.inputs] if add is not None else []
    products = [node for node in factors if node is not None]
    if len(products) != 2:
        return None
    for plain, turned in (products, products[::-1]):
        for i, j in ((0, 1), (1, 0)):
            source = _half_turned(operand(turned, i))
            if source is None:
                continue
            k = next((k for k in (0, 1) if plain.inputs[k] is source), None)
            cos = _unsqueezed(operand(plain, 1 - k)) if k is not None else None
            sin = _unsqueezed(operand(turned, j))
            if cos is not None and sin is not None:
                return Rotary(source, cos, sin)
    return None


def _half_turned(value: ir.Value) -> ir.Value | None:
    """x, when `value` is concat(-x[half:], x[:half]) on the last axis."""
    joined = producer(value, "Concat")
    if joined is None or len(joined.inputs) != 2:
        return None
    negated, first = producer(joined.inputs[0], "Neg"), joined.inputs[1]
    second_half, first_half = _piece(negated.inputs[0] if negated is not None else None), _piece(first)
    if second_half is None or first_half is None or second_half[0] is not first_half[0]:
        return None
    source = first_half[0]
    size = source.shape[-1] if source.shape is not None else None
    return source if isinstance(size, int) and (first_half[1], second_half[1]) == (0, size // 2) else None


def _piece(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """(whole, start) of a slice of the last axis, or of one half of an even split."""
    cut = producer(value, "Slice")
    if cut is not None:
        start = integers(cut.inputs[1])
        return (operand(cut, 0), start[0]) if start is not None and len(start) == 1 else None
    split = producer(value, "Split")
    if split is None or len(split.outputs) != 2:
        return None
    whole = operand(split, 0)
    return whole, 0 if value is split.outputs[0] else size_of(whole, -1) // 2


def _unsqueezed(value: ir.Value) -> ir.Value | None:
    """[B, T, D] when `value` is its [B, 1, T, D]."""
    node = producer(value, "Unsqueeze")
    return node.inputs[0] if node is not None and integers(node.inputs[1]) == [1] else None


def rotary_table(model: ir.Model, value: ir.Value, positions: int) -> NDArray[np.float32] | None:
    """[positions, D'/2] float32: cosines (or sines) at positions 0, 1, …

    None when they depend on anything but each row's own position, or when the second half of a row does not repeat the first
    (as it does in every checkpoint that rotates halves against each other).
    """
    import onnxruntime as ort

    part = part_in_memory(model, [contract.POSITION_IDS], [name_of(value)])
    if part is None:  # it also depends on another input
        return None
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(part, options, providers=["CPUExecutionProvider"])
    table = _run(session, np.arange(positions))
    half = table.shape[-1] // 2
    probe = [0, positions // 2, positions - 1]
    alone = np.concatenate([_run(session, np.array([p])) for p in probe])
    same_halves = np.array_equal(table[:, :half], table[:, half:])
    return np.ascontiguousarray(table[:, :half]) if same_halves and np.allclose(alone, table[probe], atol=1e-6) else None


def _run(session: Any, positions: NDArray[np.int64]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = session.run(None, {contract.POSITION_IDS: positions[None].astype(np.int64)})[0][0]
    return result

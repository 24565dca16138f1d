"""Linear layers that read the same activations become one: query, key and value, or the two halves of a gated MLP.

One multiplication over all columns has one dispatch and one packing of its input where there were several, and
GroupQueryAttention takes query, key and value in one piece.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .linear import Linear, linears
from .surgery import Writer, clean, constant_of, only_user, replace_value
from .values import array_of, dtype_of, shape_of


def pack_linears(model: ir.Model) -> tuple[ir.Model, bool]:
    """Join the layers of each shared input, with their biases when all have one."""
    groups: dict[tuple[int, ir.DataType, int | None], list[Linear]] = {}
    for linear in linears(model):
        if not linear.transposed:  # a tied embedding keeps its own layout
            kind = dtype_of(linear.weight), None if linear.scales is None else len(shape_of(linear.scales))
            groups.setdefault((id(linear.node.inputs[0]), *kind), []).append(linear)
    packable = [group for group in groups.values() if len(group) > 1]
    for group in packable:
        _pack(model, group)
    if packable:
        clean(model)
    return model, bool(packable)


def _pack(model: ir.Model, group: list[Linear]) -> None:
    first = group[0]
    write = Writer(model, first.node)
    name = "+".join([first.name, *(linear.name.rsplit(".", 2)[-2] for linear in group[1:])])
    product = write.node("MatMul", [first.node.inputs[0], _packed_weight(write, name, group)])
    results = [linear.node.outputs[0] for linear in group]
    biases = [_bias(result) for result in results]
    if all(bias is not None for bias in biases):
        results = [bias[0].outputs[0] for bias in biases if bias is not None]
        joined = np.concatenate([bias[1] for bias in biases if bias is not None])
        product = write.node("Add", [product, write.constant(f"{name}.bias", joined)])
    widths = write.ints([linear.shape[1] for linear in group])
    pieces = write.nodes("Split", [product, widths], len(group), axis=-1)
    for old, new in zip(results, pieces, strict=True):
        replace_value(old, new)


def _packed_weight(write: Writer, name: str, group: list[Linear]) -> ir.Value:
    values = np.concatenate([array_of(linear.weight) for linear in group], axis=1)
    if not group[0].quantized:
        return write.constant(name, values)
    scales = np.concatenate([array_of(linear.required_scales) for linear in group], axis=-1)
    weight, scale = write.constant(f"{name}.quantized", values), write.constant(f"{name}.scale", scales)
    if scales.ndim == 1:
        return write.node("DequantizeLinear", [weight, scale], axis=1)
    return write.node("DequantizeLinear", [weight, scale], axis=0, block_size=len(values) // len(scales))


def _bias(result: ir.Value) -> tuple[ir.Node, NDArray[Any]] | None:
    """(Add node, [N] bias) when all that happens to `result` is the addition of a constant vector."""
    add = only_user(result)
    if add is None or add.op_type != "Add":
        return None
    other = add.inputs[1] if add.inputs[0] is result else add.inputs[0]
    bias = constant_of(other)
    return (add, bias) if bias is not None and bias.ndim == 1 else None

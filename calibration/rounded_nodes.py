"""Nodes that read rounded weights in place of floats: a linear layer's, and an embedding's."""

from typing import Any

import numpy as np

from headstart.exporter.passes.linear import Linear
from headstart.exporter.passes.surgery import Writer, replace_value

from .rounding import INT8, QuantizedWeight, round_to_nearest


def replace_linear(model: Any, linear: Linear, weight: QuantizedWeight) -> None:
    """Put a DequantizeLinear in front of the MatMul, the values stored in the layout the float weight had."""
    import ml_dtypes

    write = Writer(model, linear.node)
    grouped = weight.scales.ndim == 2
    values, scales = (weight.values.T, weight.scales.T) if linear.transposed else (weight.values, weight.scales)
    stored = np.ascontiguousarray(values).astype(ml_dtypes.int4 if grouped else np.int8)
    inputs = [
        write.constant(f"{linear.name}.quantized", stored),
        write.constant(f"{linear.name}.scale", np.ascontiguousarray(scales)),
    ]
    inputs_axis = int(linear.transposed)  # where the K inputs lie
    if grouped:
        group = len(weight.values) // len(weight.scales)
        result = write.node("DequantizeLinear", inputs, axis=inputs_axis, block_size=group)
    else:
        result = write.node("DequantizeLinear", inputs, axis=1 - inputs_axis)
    if linear.transposed:
        result = write.node("Transpose", [result], perm=[1, 0])
    linear.node.replace_input_with(1, result)


def replace_embedding(model: Any, gather: Any, table: Any) -> None:
    """Gather whole numbers and scales, and multiply: dequantizing the table would cost a pass over the vocabulary."""
    import onnx_ir as ir

    write = Writer(model, gather)
    name = table.name
    if f"{name}.quantized" not in model.graph.initializers:  # a tied LM head has made them
        rounded = round_to_nearest(table.const_value.numpy().T, INT8)
        write.constant(f"{name}.quantized", np.ascontiguousarray(rounded.values.T))
        write.constant(f"{name}.scale", rounded.scales)
    values, scales = (model.graph.initializers[f"{name}.{part}"] for part in ("quantized", "scale"))
    ids, result = gather.inputs[1], gather.outputs[0]
    rows = write.node("Cast", [write.node("Gather", [values, ids], axis=0)], to=ir.DataType.FLOAT)
    scale = write.node("Unsqueeze", [write.node("Gather", [scales, ids], axis=0), write.ints([-1])])
    replace_value(result, write.node("Mul", [rows, scale]))

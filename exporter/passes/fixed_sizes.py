"""Axes that a device needs to know when it builds get their size: the batch, and the slots of the caches."""

from collections.abc import Mapping

import onnx_ir as ir

from .values import shape_of


def fix_sizes(model: ir.Model, sizes: Mapping[str, int]) -> tuple[ir.Model, bool]:
    """Put `sizes` (axis name -> size) into the graph's inputs; other shapes are dropped, for the builder to infer."""
    changed = False
    for value in model.graph.inputs:
        shape = [sizes.get(str(axis.value), axis) if isinstance(axis, ir.SymbolicDim) else axis for axis in shape_of(value)]
        changed |= any(new is not old for new, old in zip(shape, shape_of(value), strict=True))
        value.shape = ir.Shape(shape)
    if changed:
        for node in model.graph:
            for value in node.outputs:
                value.shape = None
    return model, changed

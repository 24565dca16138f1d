"""Axes that a device wants to know when it builds get their size: the batch, and the slots of the caches."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir


def fix_sizes(model: Any, sizes: Mapping[str, int]) -> tuple[Any, bool]:
    """Put `sizes` (axis name -> size) into the graph's inputs; what depends on them is forgotten, for the builder to infer."""
    changed = False
    for value in model.graph.inputs:
        shape = [sizes.get(str(axis.value), axis) if isinstance(axis, ir.SymbolicDim) else axis for axis in value.shape]
        changed |= any(new is not old for new, old in zip(shape, value.shape, strict=True))
        value.shape = ir.Shape(shape)
    if changed:
        for node in model.graph:
            for value in node.outputs:
                value.shape = None
    return model, changed

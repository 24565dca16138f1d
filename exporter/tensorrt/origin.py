"""Which module of the checkpoint a node of a graph came from, for messages."""

import re
from pathlib import Path

import onnx_ir as ir


def source_module(file: Path, node_name: str) -> str:
    """The checkpoint's module that a node of a graph belongs to, and its layer, by the nearest weight."""
    nodes = list(ir.load(file).graph)
    place = next((i for i, node in enumerate(nodes) if node.name == node_name), None)
    if place is None:
        return "an unknown module"
    for node in (*nodes[place::-1], *nodes[place + 1 :]):
        for value in node.inputs:
            module = _module(value.name) if value is not None and value.is_initializer() else None
            if module is not None:
                layer = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", module)
                return f"{module} or just after it" + (f" (layer {layer.group(1)})" if layer else "")
    return "an unknown module"


def _module(weight: str | None) -> str | None:
    """The module of a weight's or a bias's name; None for constants of other origin."""
    matched = re.match(r"(.+?)\.(weight|bias)\b", weight or "")
    return matched.group(1) if matched else None

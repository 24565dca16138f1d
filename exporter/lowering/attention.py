"""Which attention layers of a lowered graph are decomposed into products and a softmax, which no fused kernel takes.

TensorRT's attention has no attribute for caps on the scores (Gemma 2, T5Gemma); and older versions have no attention layer at
all. Those layers are computed in parts, exactly, from caches that are updated in place all the same.
"""

import onnx_ir as ir

from headstart.exporter.passes.values import name_of
from headstart.runtime import contract

KEYS = {contract.key_name(0)[:-1]: "self-attention", contract.cross_key_name(0)[:-1]: "cross-attention"}


def decomposed_attention(model: ir.Model) -> tuple[str, ...]:
    """As "self-attention 0": of a decoder by its caches, of an encoder in the order of computation ("attention 0")."""
    caches = [
        (kind, value) for value in model.graph.inputs for prefix, kind in KEYS.items() if name_of(value).startswith(prefix)
    ]
    if caches:
        return tuple(f"{kind} {name_of(value).rsplit('.', 1)[1]}" for kind, value in caches if not _attended(value))
    layers = [node.op_type for node in model.graph if node.op_type in ("Attention", "Softmax")]
    return tuple(f"attention {index}" for index, kind in enumerate(layers) if kind == "Softmax")


def _attended(value: ir.Value) -> bool:
    """Whether a cache, before it is multiplied, is read by an Attention."""
    waiting = [value]
    while waiting:
        for node, _ in waiting.pop().uses():
            if node.op_type == "Attention":
                return True
            if node.op_type not in ("MatMul", "Shape"):
                waiting += node.outputs
    return False

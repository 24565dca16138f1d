"""Which attention layers of a lowered graph are spelled out in products and a softmax, which no fused kernel takes.

Caps on the scores (Gemma 2, T5Gemma) are no attribute that TensorRT's attention has; and older versions have no such layer at
all. Those layers are computed in parts, exactly, from caches that are updated in place all the same.
"""

from typing import Any

from headstart.runtime import contract

KEYS = {contract.key_name(0)[:-1]: "self-attention", contract.cross_key_name(0)[:-1]: "cross-attention"}


def decomposed_attention(model: Any) -> tuple[str, ...]:
    """As "self-attention 0": of a decoder by its caches, of an encoder in the order of computation ("attention 0")."""
    caches = [(kind, value) for value in model.graph.inputs for prefix, kind in KEYS.items() if value.name.startswith(prefix)]
    if caches:
        return tuple(f"{kind} {value.name.rsplit('.', 1)[1]}" for kind, value in caches if not _attended(value))
    layers = [node.op_type for node in model.graph if node.op_type in ("Attention", "Softmax")]
    return tuple(f"attention {index}" for index, kind in enumerate(layers) if kind == "Softmax")


def _attended(value: Any) -> bool:
    """Whether what becomes of a cache, before it is multiplied, goes into an Attention."""
    waiting = [value]
    while waiting:
        for node, _ in waiting.pop().uses():
            if node.op_type == "Attention":
                return True
            if node.op_type not in ("MatMul", "Shape"):
                waiting += node.outputs
    return False

"""The target's LM head as the projection of a draft head: all of it where it lies, or copies of the rows that are drafted."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.exporter.graph_builder import GraphBuilder
from headstart.exporter.passes.rotation import rotate
from headstart.runtime.bundle import WeightInfo
from headstart.runtime.errors import HeadError
from headstart.runtime.token_rows import LM_HEAD, TokenRows, TokenTable

from .family import Installation
from .storage import copied_rows, reference

SCALE = f"{LM_HEAD}.scale"  # of quantized bundles


@dataclass(frozen=True)
class TargetLmHead:
    """Attributes:
    hidden: width of the states that it projects.
    shared: where it lies; empty with `rows`.
    rows: copies.
    """

    hidden: int
    shared: dict[str, WeightInfo]
    rows: TokenRows | None = None

    @classmethod
    def of(cls, target: Installation, token_map: NDArray[np.int64] | None, folder: Path) -> "TargetLmHead":
        """Of the tokens of `token_map`, all for None. Raises HeadError where the target's graph does not show the weight."""
        if LM_HEAD not in target.weights:
            raise HeadError(
                f"{folder} projects with the target's LM head, and this target's graph does not show which weight that is."
            )
        hidden = target.model.hidden_size
        if token_map is None:
            return cls(hidden, {name: info for name, info in target.weights.items() if name in (LM_HEAD, SCALE)})
        return cls(hidden, {}, TokenTable(target.target, target.weights, LM_HEAD, hidden).rows(token_map))


class Projection:
    """Its nodes in one graph."""

    def __init__(self, graph: GraphBuilder, lm_head: TargetLmHead) -> None:
        self._graph, self._hidden = graph, lm_head.hidden
        if lm_head.rows is not None:
            self._weight, self._rotation = copied_rows(graph, lm_head.rows), lm_head.rows.rotation
        else:
            self._weight, self._rotation = _shared(graph, lm_head), lm_head.shared[LM_HEAD].rotation

    def logits(self, state: ir.Value) -> ir.Value:
        """[K, B, H] to [K, B, V], or any other two axes."""
        if self._rotation:
            state = rotate(self._graph, state, 3, self._hidden, self._rotation)
        return self._graph.node("MatMul", [state, self._weight])


def _shared(graph: GraphBuilder, lm_head: TargetLmHead) -> ir.Value:
    """[H, V]"""
    info = lm_head.shared[LM_HEAD]
    value = graph.weight(reference(LM_HEAD, info))
    vocabulary_first = info.shape[1] == lm_head.hidden  # [V, H], as tied weights are stored
    if SCALE in lm_head.shared:
        scale = graph.weight(reference(SCALE, lm_head.shared[SCALE]))
        value = graph.node("DequantizeLinear", [value, scale], axis=0 if vocabulary_first else 1)
    elif info.dtype != "float32":
        value = graph.node("Cast", [value], to=ir.DataType.FLOAT)
    return graph.node("Transpose", [value], perm=[1, 0]) if vocabulary_first else value

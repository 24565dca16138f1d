"""A target's token embeddings, for heads that read tokens: found by what its graph does with `input_ids`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.exporter.graph import weight_info
from headstart.exporter.graph_builder import GraphBuilder
from headstart.exporter.passes.rotation import rotate, rotation_of
from headstart.runtime import contract
from headstart.runtime.bundle import WeightInfo
from headstart.runtime.errors import HeadError
from headstart.runtime.token_rows import EMBEDDINGS, TokenRows, TokenTable

from .family import Installation

DECODER = "graphs/decoder.onnx"
SCALE = f"{EMBEDDINGS}.scale"


def embeddings_of(bundle: Path) -> dict[str, WeightInfo]:
    """Where the table of the bundle in that folder lies: [V, H], and [V] scales as "embeddings.scale" of a quantized one.

    Empty where the decoder looks nothing up by `input_ids`, or something else than rows of one table.
    """
    model = ir.load(bundle / DECODER)
    ids = next((value for value in model.graph.inputs if value.name == contract.INPUT_IDS), None)
    lookups = {} if ids is None else {len(one.shape): (one, node) for node in ids.consumers() if (one := _table(node))}
    if sorted(lookups) not in ([2], [1, 2]):
        return {}
    folder, (table, gather) = Path(DECODER).parent.as_posix(), lookups[2]
    infos = {EMBEDDINGS: dataclasses.replace(weight_info(table, folder), rotation=_rotation_after(gather.outputs[0]))}
    return infos | ({SCALE: weight_info(lookups[1][0], folder)} if 1 in lookups else {})


def _table(node: ir.Node) -> ir.ExternalTensor | None:
    """What the node looks rows up in."""
    value = node.inputs[0] if node.op_type == "Gather" else None
    tensor = value.const_value if value is not None else None
    return tensor if isinstance(tensor, ir.ExternalTensor) else None


def _rotation_after(value: ir.Value) -> int:
    """The block of the rotation that what was looked up goes through first, but for what dequantizes it; 0 for none."""
    users = value.consumers()
    while len(users) == 1 and users[0].op_type in ("Cast", "Mul", "Reshape", "MatMul"):
        value = users[0].outputs[0]
        if users[0].op_type == "Reshape" and rotation_of(value):
            return rotation_of(value)
        users = value.consumers()
    return 0


@dataclass(frozen=True)
class DraftedVocabulary:
    """The tokens that a head drafts, and the target's embeddings.

    Attributes:
        rows: the embeddings of these tokens.
        token_map: [V'] the target's ids of them; None where all of the target's are drafted.
        table: where all embeddings lie, see `embeddings_of`.
    """

    rows: TokenRows
    token_map: NDArray[np.int64] | None
    table: dict[str, WeightInfo]

    @classmethod
    def of(cls, target: Installation, token_map: NDArray[np.int64] | None, folder: Path) -> "DraftedVocabulary":
        """Raises HeadError where the target's graph does not show its embeddings, or they are not as wide as its states."""
        model, table = target.model, embeddings_of(target.target)
        if not table or table[EMBEDDINGS].shape != (model.vocab_size, model.hidden_size):
            raise HeadError(
                f"{folder} reads the target's embeddings, [{model.vocab_size}, {model.hidden_size}], and this target's graph "
                f"shows {list(table[EMBEDDINGS].shape) if table else 'none'}. Such heads cannot draft for it."
            )
        tokens = np.arange(model.vocab_size) if token_map is None else token_map
        return cls(TokenTable(target.target, table, EMBEDDINGS, model.hidden_size).rows(tokens), token_map, table)


class Lookup:
    """The embeddings of the drafted tokens in one graph, stored as the bundle stores them."""

    def __init__(self, graph: GraphBuilder, rows: TokenRows) -> None:
        self._graph, self._rotation, self._width = graph, rows.rotation, rows.values.shape[1]
        self._values = graph.constant(EMBEDDINGS, rows.values)
        self._scales = None if rows.scales is None else graph.constant(SCALE, rows.scales)

    def of(self, tokens: ir.Value) -> ir.Value:
        """[B, n] rows of the drafted vocabulary to [B, n, H]."""
        found = self._graph.node("Gather", [self._values, tokens], axis=0)
        if self._scales is not None:
            scales = self._graph.node("Gather", [self._scales, tokens], axis=0)
            scales = self._graph.node("Unsqueeze", [scales, self._graph.ints("last", [-1])])
            found = self._graph.node("Mul", [self._graph.node("Cast", [found], to=ir.DataType.FLOAT), scales])
        return rotate(self._graph, found, 3, self._width, self._rotation) if self._rotation else found

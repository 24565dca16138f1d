"""MLP speculators (arXiv 2404.19124), as IBM publishes them for transformers and vLLM.

Level i reads the token before its own with an embedding E_i of its own: s = GELU(N_i(c P_i s + d √(D / 2) E_i[token])), from
s = h, the hidden state that decided the root (N(h) / √2 where `scale_input`); logits = W_i s. D is the inner width;
c = 2^(-1 / 2n) and d = √(1 - c²) of n levels; N divides by the root mean square, and N_i scales and shifts, too. Tied weights
are saved once, with the first level that has them.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.exporter.graph_builder import GraphBuilder
from headstart.runtime.bundle import HeadInfo
from headstart.runtime.errors import HeadError

from .family import Family, Format, Installation, Reads
from .folder import HeadFolder, Tensors
from .layers import LinearLayer
from .tree_graph import write_tree_head

Array = NDArray[np.float32]
Stored = TypeVar("Stored")
TENSORS = r"(speculator\.)?(emb|proj|head|ln)\.\d+\.(weight|bias)"
EPSILON = 1e-6  # of the norms


@dataclass(frozen=True)
class Level:
    """Attributes:
    embedding: [V, D].
    projection: [D, H] of the first level, else [D, D].
    scale, shift: [D] of the norm.
    logits: [V, D].
    """

    embedding: Array
    projection: Array
    scale: Array
    shift: Array
    logits: Array


def recognise(folder: HeadFolder) -> Format | None:
    named = any(re.fullmatch(r"speculator\.(emb|proj|head)\..*", name) for name in folder.files)
    stated = folder.config.get("model_type") == "mlp_speculator"
    return Format("mlp_speculator") if named or (stated and folder.files) else None


def to_graphs(folder: HeadFolder, dialect: str, target: Installation) -> HeadInfo:
    """One graph, which drafts a tree. Raises HeadError when the speculator does not fit the target."""
    hidden, vocab_size = target.model.hidden_size, target.model.vocab_size
    named = {name.removeprefix("speculator."): tensor for name, tensor in folder.tensors(TENSORS).items()}
    levels = _levels(folder, named, hidden, vocab_size)
    graph = GraphBuilder()
    cell = SpeculatorCell(graph, levels, bool(folder.config.get("scale_input", False)))
    return write_tree_head(graph, cell, "mlp_speculator", dialect, target, vocab_size)


def _levels(folder: HeadFolder, tensors: Tensors, hidden: int, vocab_size: int) -> list[Level]:
    """As many as the configuration says: tied ones are not in the file."""
    count = folder.config.get("n_predict")
    if not isinstance(count, int) or count < 1:
        raise HeadError(
            f"{folder.path}/config.json must state n_predict, at least 1, found {count!r}. Fix: the file as published."
        )

    def part(name: str, level: int, *shape: int, kind: str = "weight") -> Array:
        """Of the level, or of the last before it that has one; the first projection is of another shape."""
        tied = (f"{name}.{i}.{kind}" for i in range(level, -1, -1))
        tensor = next((tensors[one] for one in tied if one in tensors and tensors[one].shape == shape), None)
        if tensor is None:
            raise HeadError(
                f"{folder.path}: {name}.{level}.{kind} must be {list(shape)}, and neither it nor one before it is. Fix: the "
                "complete file, of a speculator trained for this very target."
            )
        return tensor

    width = len(tensors["proj.0.weight"]) if "proj.0.weight" in tensors else hidden
    return [
        Level(
            embedding=part("emb", level, vocab_size, width),
            projection=part("proj", level, width, hidden if level == 0 else width),
            scale=part("ln", level, width),
            shift=part("ln", level, width, kind="bias"),
            logits=part("head", level, vocab_size, width),
        )
        for level in range(count)
    ]


class SpeculatorCell:
    """The state is s."""

    def __init__(self, graph: GraphBuilder, levels: Sequence[Level], scale_input: bool) -> None:
        self.depth, self._scale_input, width = len(levels), scale_input, len(levels[0].projection)
        state = 0.5 ** (0.5 / self.depth)
        self._state_weight = graph.constant("state_weight", np.float32(state))
        self._embedding_weight = graph.constant("embedding_weight", np.float32(math.sqrt((1 - state**2) * width / 2)))
        self._epsilon = graph.constant("epsilon", np.float32(EPSILON))
        self._embeddings = _once(levels, "embedding", graph.constant)
        self._scales, self._shifts = (_once(levels, part, graph.constant) for part in ("scale", "shift"))

        def linear(name: str, weight: Array) -> LinearLayer:
            return LinearLayer(graph, (weight, None), name)

        self._projections, self._logits = (_once(levels, part, linear) for part in ("projection", "logits"))

    def embed(self, graph: GraphBuilder, tokens: ir.Value, level: int) -> ir.Value:
        found = graph.node("Gather", [self._embeddings[level], tokens], axis=0)
        return graph.node("Mul", [found, self._embedding_weight])

    def step(self, graph: GraphBuilder, state: ir.Value, embedding: ir.Value, level: int) -> ir.Value:
        if level == 0 and self._scale_input:
            root = graph.constant("root_of_two", np.float32(math.sqrt(2)))
            state = graph.node("Div", [self._normalized(graph, state, level), root])
        projected = graph.node("Mul", [self._projections[level].of(state), self._state_weight])
        normalized = self._normalized(graph, graph.node("Add", [projected, embedding]), level + 1)
        scaled = graph.node("Mul", [normalized, self._scales[level]])
        return graph.node("Gelu", [graph.node("Add", [scaled, self._shifts[level]])])

    def logits(self, graph: GraphBuilder, state: ir.Value, level: int) -> ir.Value:
        return self._logits[level].of(state)

    def _normalized(self, graph: GraphBuilder, value: ir.Value, number: int) -> ir.Value:
        squares = graph.node("Mul", [value, value])
        mean = graph.node("ReduceMean", [squares, graph.ints(f"last_axis.{number}", [-1])], keepdims=1)
        return graph.node("Div", [value, graph.node("Sqrt", [graph.node("Add", [mean, self._epsilon])])])


def _once(levels: Sequence[Level], part: str, store: Callable[[str, Array], Stored]) -> list[Stored]:
    """That part of each level, stored; the same where levels share the array."""
    arrays: list[Array] = [getattr(level, part) for level in levels]
    different = {id(array): array for array in arrays}
    stored = {key: store(f"{part}.{number}", array) for number, (key, array) in enumerate(different.items())}
    return [stored[id(array)] for array in arrays]


FAMILY = Family(recognise, lambda folder, layers: Reads(), to_graphs)

"""Recurrent drafting's head, ReDrafter (arXiv 2403.09919), as apple/ml-recurrent-drafter saves it.

With the hidden state h that decided the root, and the target's embeddings e of the root and of what was drafted:
s = SiLU(W e + U s + b) from s = 0, or s + e where there is no recurrent unit; x = [h; s], through a projection where the head
is of another width; x = x + SiLU(A x + a) for each block; logits = V x. All levels have the same weights.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from headstart.exporter.graph_builder import GraphBuilder
from headstart.runtime.bundle import HeadInfo
from headstart.runtime.errors import HeadError

from .embeddings import DraftedVocabulary, Lookup
from .family import Family, Format, Installation, Reads
from .folder import HeadFolder, Tensors
from .layers import Linear, LinearLayer, silu
from .tree_graph import write_tree_head

LEVELS = 4  # drafted tokens of a path, as published: beams of five with the root
TENSORS = r"(rnn_u|rnn_w|input_proj|lm_head\.\d+(\.linear)?)\.(weight|bias)"


@dataclass(frozen=True)
class Weights:
    """Attributes:
    recurrent: W, and U with b; empty where states are sums of embeddings.
    projection: of [h; s] to the head's own width; None where that is the same.
    blocks: A with a, of each.
    logits: V.
    """

    recurrent: Sequence[Linear]
    projection: Linear | None
    blocks: Sequence[Linear]
    logits: Linear


def recognise(folder: HeadFolder) -> Format | None:
    recurrent = any(re.fullmatch(r"rnn_[uw]\..*", name) for name in folder.files)
    stated = folder.config.get("model_type") == "recurrent_drafting_drafter"
    return Format("ml-recurrent-drafter") if recurrent or (stated and folder.files) else None


def to_graphs(folder: HeadFolder, dialect: str, target: Installation) -> HeadInfo:
    """One graph, which drafts a tree. Raises HeadError when the head does not fit the target."""
    hidden, vocab_size = target.model.hidden_size, target.model.vocab_size
    weights = _weights(folder, folder.tensors(TENSORS), hidden, vocab_size)
    graph, vocabulary = GraphBuilder(), DraftedVocabulary.of(target, None, folder.path)
    cell = RecurrentCell(graph, weights, vocabulary, hidden)
    return write_tree_head(graph, cell, "recurrent_drafting", dialect, target, vocab_size, vocabulary)


def _weights(folder: HeadFolder, tensors: Tensors, hidden: int, vocab_size: int) -> Weights:
    def part(name: str, *shape: int) -> Linear:
        weight = tensors.get(f"{name}.weight")
        if weight is None or weight.shape != shape:
            found = "none" if weight is None else list(weight.shape)
            raise HeadError(
                f"{folder.path}: {name}.weight must be {list(shape)}, found {found}. Fix: the complete file, of a head trained "
                "for this very target."
            )
        return weight, tensors.get(f"{name}.bias")

    places = [int(found[1]) for name in tensors if (found := re.fullmatch(r"lm_head\.(\d+)\.linear\.weight", name))]
    projected = "input_proj.weight" in tensors
    width = len(tensors["input_proj.weight"]) if projected else 2 * hidden
    recurrent = any(name.startswith("rnn_") for name in tensors)
    return Weights(
        recurrent=[part("rnn_w", hidden, hidden), part("rnn_u", hidden, hidden)] if recurrent else [],
        projection=part("input_proj", width, 2 * hidden) if projected else None,
        blocks=[part(f"lm_head.{place}.linear", width, width) for place in range(len(places))],
        logits=part(f"lm_head.{len(places)}", vocab_size, width),
    )


class RecurrentCell:
    """The state is [h; s]."""

    depth = LEVELS

    def __init__(self, graph: GraphBuilder, weights: Weights, vocabulary: DraftedVocabulary, hidden: int) -> None:
        self._lookup, self._sizes = Lookup(graph, vocabulary.rows), graph.ints("sizes", [hidden, hidden])
        self._recurrent = [LinearLayer(graph, one, f"recurrent.{number}") for number, one in enumerate(weights.recurrent)]
        self._projection = None if weights.projection is None else LinearLayer(graph, weights.projection, "projection")
        self._blocks = [LinearLayer(graph, block, f"block.{number}") for number, block in enumerate(weights.blocks)]
        self._logits = LinearLayer(graph, weights.logits, "logits")

    def embed(self, graph: GraphBuilder, tokens: ir.Value, level: int) -> ir.Value:
        return self._lookup.of(tokens)

    def step(self, graph: GraphBuilder, state: ir.Value, embedding: ir.Value, level: int) -> ir.Value:
        if level == 0:
            hidden, recurrent = state, None
        else:
            hidden, recurrent = graph.nodes("Split", [state, self._sizes], 2, axis=-1)
        if not self._recurrent:
            summed = embedding if recurrent is None else graph.node("Add", [recurrent, embedding])
            return graph.node("Concat", [hidden, summed], axis=-1)
        w, u = self._recurrent
        entered = w.of(embedding)
        kept = u.bias if recurrent is None else u.of(recurrent)  # U of zeros is its bias
        inner = entered if kept is None else graph.node("Add", [entered, kept])
        return graph.node("Concat", [hidden, silu(graph, inner)], axis=-1)

    def logits(self, graph: GraphBuilder, state: ir.Value, level: int) -> ir.Value:
        value = state if self._projection is None else self._projection.of(state)
        for block in self._blocks:
            value = graph.node("Add", [value, silu(graph, block.of(value))])
        return self._logits.of(value)


FAMILY = Family(recognise, lambda folder, layers: Reads(), to_graphs)

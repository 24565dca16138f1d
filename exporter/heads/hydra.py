"""Hydra heads: each reads the tokens drafted before it (arXiv 2402.05109).

Head i: x = [h; e(t + 1); …; e(t + i + 1)], with the hidden state h at position t, which decided token t + 1, and the
target's embeddings e; y = R x + SiLU(A x + a); then y = y + SiLU(A' y + a') for each further block; logits = W y + w, of token
t + i + 2. W may be the target's LM head, and the drafted tokens may be a part of the vocabulary.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.exporter.graph_builder import GraphBuilder
from headstart.runtime.bundle import HeadInfo
from headstart.runtime.errors import HeadError

from .embeddings import DraftedVocabulary, Lookup
from .family import Family, Format, Installation, Reads
from .folder import HeadFolder, Tensors
from .layers import Linear, LinearLayer, silu
from .lm_head import Projection, TargetLmHead
from .token_map import token_map_of
from .tree_graph import write_tree_head

Array = NDArray[np.float32]
DIALECT = "hydra"
PREFIX = r"(?:hydra_head\.)?"  # in checkpoints that were saved with their base
BLOCK = re.compile(PREFIX + r"hydra_mlp\.(\d+)\.(\d+)\.(linear|res_connection)\.(weight|bias)")
PROJECTION = re.compile(PREFIX + r"hydra_lm_head\.(\d+)\.(?:\d+\.)?(weight|bias)")
TOKEN_MAP = re.compile(PREFIX + r"hydra_token_map")  # calibration/train.py
# Hydra++ puts a decoder layer, with keys and values of its own, before the MLPs; and two experiments of the paper.
OTHER_ARCHITECTURES = ("prefix-mlp", "cross-attn", "eagle-attn")


@dataclass(frozen=True)
class Head:
    """One head.

    Attributes:
        residual: R of the first block, the width of whose input is not that of its output.
        blocks: A and a of each block.
        projection: W and w; None where W is the target's LM head.
    """

    residual: Linear
    blocks: Sequence[Linear]
    projection: Linear | None


def recognise(folder: HeadFolder) -> Format | None:
    """Raises HeadError for the architectures that are more than MLPs."""
    if not any(BLOCK.fullmatch(name) for name in folder.files):
        return None
    architecture = folder.config.get("hydra_head_arch", "mlp")
    if architecture in OTHER_ARCHITECTURES or any("prefix_embeding_layer" in name for name in folder.files):
        raise HeadError(
            f"{folder.path}: these Hydra heads are {architecture}, and have attention of their own. This version imports those "
            'of hydra_head_arch "mlp". Fix: headstart heads train --family hydra trains such heads.'
        )
    return Format(DIALECT)


def to_graphs(folder: HeadFolder, dialect: str, target: Installation) -> HeadInfo:
    """One graph, which drafts a tree. Raises HeadError when the heads do not fit the target."""
    tensors = folder.tensors("|".join(f"(?:{one.pattern})" for one in (BLOCK, PROJECTION, TOKEN_MAP)))
    stored = next((tensor for name, tensor in tensors.items() if TOKEN_MAP.fullmatch(name)), None)
    token_map = None if stored is None else token_map_of(stored, target.model.vocab_size, folder.path)
    vocabulary = DraftedVocabulary.of(target, token_map, folder.path)
    heads, rows = _heads(folder, tensors, target.model.hidden_size), len(vocabulary.rows.values)
    _check_projections(folder, heads, rows, target)
    lm_head = TargetLmHead.of(target, token_map, folder.path) if heads[0].projection is None else None
    graph = GraphBuilder()
    cell = HydraCell(graph, heads, vocabulary, lm_head)
    shared = lm_head.shared if lm_head is not None else {}
    return write_tree_head(graph, cell, "hydra", dialect, target, rows, vocabulary, shared)


def _heads(folder: HeadFolder, tensors: Tensors, hidden: int) -> list[Head]:
    """In the order of the tokens they propose. Raises HeadError for a tensor that is missing, or of another width."""
    blocks: dict[tuple[int, int, str, str], Array] = {}
    projections: dict[tuple[int, str], Array] = {}
    for name, tensor in tensors.items():
        if found := BLOCK.fullmatch(name):
            blocks[int(found[1]), int(found[2]), found[3], found[4]] = tensor
        elif found := PROJECTION.fullmatch(name):
            projections[int(found[1]), found[2]] = tensor
    count = 1 + max(head for head, *_ in blocks)
    heads = [_head(folder, blocks, projections, head, hidden) for head in range(count)]
    if len({head.projection is None for head in heads}) > 1:
        raise HeadError(f"{folder.path}: some heads have a projection and others have none. Fix: the complete file.")
    return heads


def _head(
    folder: HeadFolder,
    blocks: dict[tuple[int, int, str, str], Array],
    projections: dict[tuple[int, str], Array],
    head: int,
    hidden: int,
) -> Head:
    def part_of(place: int, part: str, width: int) -> Linear:
        weight, bias = (blocks.get((head, place, part, kind)) for kind in ("weight", "bias"))
        if weight is None or weight.shape != (hidden, width):
            found = "none" if weight is None else list(weight.shape)
            raise HeadError(
                f"{folder.path}: {part} of head {head}, block {place} must have a weight [{hidden}, {width}], found {found}. "
                "Fix: the complete file, of heads trained for this very target."
            )
        return weight, bias

    places = sorted({place for number, place, *_ in blocks if number == head})  # not all numbers: dropout stands between
    widths = [(head + 2) * hidden, *[hidden] * (len(places) - 1)]
    first = places[0] if places else 0
    layers = [part_of(place, "linear", width) for place, width in zip(places or [first], widths, strict=True)]
    weight = projections.get((head, "weight"))
    projection = None if weight is None else (weight, projections.get((head, "bias")))
    return Head(part_of(first, "res_connection", widths[0]), layers, projection)


def _check_projections(folder: HeadFolder, heads: Sequence[Head], rows: int, target: Installation) -> None:
    wanted = (rows, target.model.hidden_size)
    for head in heads:
        if head.projection is not None and head.projection[0].shape != wanted:
            raise HeadError(
                f"{folder.path}: the heads' projections must be {list(wanted)}, found {list(head.projection[0].shape)}. "
                "Fix: heads trained for this very target."
            )


class HydraCell:
    """The state is [e; …; e], of all tokens that a path has read.

    What reads h and what reads tokens are products of their own: the first is the same for all beams, and rounded to 8 bits as
    one row with states, embeddings would vanish, which are far smaller in most models.
    """

    def __init__(
        self, graph: GraphBuilder, heads: Sequence[Head], vocabulary: DraftedVocabulary, lm_head: TargetLmHead | None
    ) -> None:
        self.depth, self._lookup = len(heads), Lookup(graph, vocabulary.rows)
        self._first = [FirstBlock(graph, head, f"{i}.0") for i, head in enumerate(heads)]
        self._blocks = [
            [LinearLayer(graph, block, f"{i}.{number}") for number, block in enumerate(head.blocks[1:], start=1)]
            for i, head in enumerate(heads)
        ]
        own = [(i, head.projection) for i, head in enumerate(heads) if head.projection is not None]
        self._projections = [LinearLayer(graph, projection, f"{i}.projection") for i, projection in own]
        self._lm_head = None if lm_head is None else Projection(graph, lm_head)

    def embed(self, graph: GraphBuilder, tokens: ir.Value, level: int) -> ir.Value:
        return self._lookup.of(tokens)

    def step(self, graph: GraphBuilder, state: ir.Value, embedding: ir.Value, level: int) -> ir.Value:
        if level == 0:
            self._hidden = state
            return embedding
        return graph.node("Concat", [state, embedding], axis=-1)

    def logits(self, graph: GraphBuilder, state: ir.Value, level: int) -> ir.Value:
        value = self._first[level].of(graph, self._hidden, state)
        for block in self._blocks[level]:
            value = graph.node("Add", [value, silu(graph, block.of(value))])
        return self._projections[level].of(value) if self._lm_head is None else self._lm_head.logits(value)


class FirstBlock:
    """R x + r + SiLU(A x + a), with both matrices in one product of h and one of the embeddings."""

    def __init__(self, graph: GraphBuilder, head: Head, name: str) -> None:
        parts = head.residual, head.blocks[0]
        hidden = len(head.residual[0])
        weight = np.concatenate([weight for weight, _ in parts])  # [2 H, (i + 2) H]
        bias = np.concatenate([np.zeros(hidden, np.float32) if bias is None else bias for _, bias in parts])
        self._of_hidden = LinearLayer(graph, (weight[:, :hidden], bias), f"{name}.of_hidden")
        self._of_tokens = LinearLayer(graph, (weight[:, hidden:], None), f"{name}.of_tokens")
        self._sizes = graph.ints(f"{name}.sizes", [hidden, hidden])

    def of(self, graph: GraphBuilder, hidden: ir.Value, tokens: ir.Value) -> ir.Value:
        """[B, 1, H] and [B, n, (i + 1) H] to [B, n, H]."""
        both = graph.node("Add", [self._of_tokens.of(tokens), self._of_hidden.of(hidden)])
        kept, inner = graph.nodes("Split", [both, self._sizes], 2, axis=-1)
        return graph.node("Add", [kept, silu(graph, inner)])


FAMILY = Family(recognise, lambda folder, layers: Reads(), to_graphs)

"""A draft tree computed by one graph: beam search with a head that reads the tokens it drafted.

The root's children are the head's best candidates; drafting goes on from the best BEAMS of them, then from the best BEAMS of
what those give, to the last level. All candidates are nodes of the tree, of which the runtime takes those that a budget pays
for. Recurrent drafting searches alike (arXiv 2403.09919), and EAGLE-2 grows its trees so (arXiv 2406.16858). Levels are
unrolled: a head has few of them, and in most families weights of its own for each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from headstart.exporter.graph import described_graph, tensor_infos
from headstart.exporter.graph_builder import GraphBuilder
from headstart.exporter.passes.values import shape_of
from headstart.runtime import contract
from headstart.runtime.bundle import HeadInfo, WeightInfo
from headstart.runtime.tree import ROOT

from .embeddings import DraftedVocabulary
from .family import Installation
from .storage import save_head

BEAMS = 4  # rows of a level; four cost a CPU hardly more than one, and the fifth best path is rarely right


class Cell(Protocol):
    """One family's arithmetic. All values have the axes [B, beams, …]; tokens are rows of the drafted vocabulary."""

    depth: int

    def embed(self, graph: GraphBuilder, tokens: ir.Value, level: int) -> ir.Value:
        """[B, n] tokens to what `step` reads of them."""
        ...

    def step(self, graph: GraphBuilder, state: ir.Value, embedding: ir.Value, level: int) -> ir.Value:
        """The state after one more token; before the first it is the target's hidden state."""
        ...

    def logits(self, graph: GraphBuilder, state: ir.Value, level: int) -> ir.Value:
        """Over the drafted vocabulary, of the token after those read."""
        ...


@dataclass(frozen=True)
class Beams:
    """What a level is drafted from, best first.

    Attributes:
        state: [B, n, …] after the beams' tokens are read.
        nodes: [B, n] their numbers in the tree.
        log_probs: [B, n] of their paths.
    """

    state: ir.Value
    nodes: ir.Value
    log_probs: ir.Value


@dataclass(frozen=True)
class Level:
    """The nodes of one depth, [B, n] each, those of one beam next to one another; tokens are rows of the drafted vocabulary."""

    tokens: ir.Value
    parents: ir.Value
    log_probs: ir.Value


class TreeGraph:
    """Unrolls the levels of one head."""

    def __init__(self, graph: GraphBuilder, cell: Cell, candidates: int) -> None:
        self._graph, self._cell, self._candidates = graph, cell, candidates
        self._beams = min(BEAMS, candidates)

    def levels(self, hidden: ir.Value, embedding: ir.Value) -> list[Level]:
        """`hidden` [B, 1, H]: of the row that decided the root; `embedding` [B, 1, …]: of the root."""
        state = self._cell.step(self._graph, hidden, embedding, 0)
        root, certain = np.full((1, 1), ROOT, np.int64), np.zeros((1, 1), np.float32)
        beams = Beams(state, self._graph.constant("root", root), self._graph.constant("certain", certain))
        levels = [self._level(beams, 0)]
        first = 0  # number of the last level's first node
        for number in range(1, self._cell.depth):
            beams = self._best(levels[-1], beams.state, first, number)
            first += self._candidates * (1 if number == 1 else self._beams)
            levels.append(self._level(beams, number))
        return levels

    def _level(self, beams: Beams, number: int) -> Level:
        """The best candidates after each beam."""
        graph = self._graph
        scores = graph.node("LogSoftmax", [self._cell.logits(graph, beams.state, number)], axis=-1)
        count = graph.ints(f"candidates.{number}", [self._candidates])
        log_probs, tokens = graph.nodes("TopK", [scores, count], 2, axis=-1, largest=1, sorted=1)  # [B, n, k]
        last, zero = graph.ints(f"last.{number}", [-1]), graph.constant(f"zero.{number}", np.int64(0))
        paths = graph.node("Add", [log_probs, graph.node("Unsqueeze", [beams.log_probs, last])])
        parents = graph.node("Add", [graph.node("Mul", [tokens, zero]), graph.node("Unsqueeze", [beams.nodes, last])])
        flat = graph.ints(f"flat.{number}", [0, -1])
        return Level(*(graph.node("Reshape", [value, flat]) for value in (tokens, parents, paths)))

    def _best(self, level: Level, state: ir.Value, first: int, number: int) -> Beams:
        """The level's best nodes, their tokens read. `state`: of the beams that the level was drafted from."""
        graph = self._graph
        count = graph.ints(f"beams.{number}", [self._beams])
        log_probs, chosen = graph.nodes("TopK", [level.log_probs, count], 2, axis=-1, largest=1, sorted=1)
        width, last = graph.constant(f"width.{number}", np.int64(self._candidates)), graph.ints(f"row.{number}", [-1])
        came_from = graph.node("Unsqueeze", [graph.node("Div", [chosen, width]), last])
        before = graph.node("GatherND", [state, came_from], batch_dims=1)
        tokens = graph.node("GatherElements", [level.tokens, chosen], axis=1)
        nodes = graph.node("Add", [chosen, graph.constant(f"first.{number}", np.int64(first))])
        return Beams(self._cell.step(graph, before, self._cell.embed(graph, tokens, number), number), nodes, log_probs)


def write_tree_head(
    graph: GraphBuilder,
    cell: Cell,
    family: str,
    dialect: str,
    target: Installation,
    rows: int,
    vocabulary: DraftedVocabulary | None = None,
    shared: dict[str, WeightInfo] | None = None,
) -> HeadInfo:
    """Write the head: `hidden` [B, 1, H], and the root or its embedding, to a tree of M nodes, see `contract.DRAFT_IDS`.

    Args:
        graph: may hold weights of `cell`.
        rows: tokens that can be drafted.
        vocabulary: which, and the target's embeddings of them; without one, the cell embeds tokens of the target's vocabulary.
        shared: weights of the target that `graph` refers to.
    """
    hidden_size, candidates, name = target.model.hidden_size, min(target.top_k, rows), target.file("head.onnx")
    hidden = ir.val(contract.HIDDEN, ir.DataType.FLOAT, (contract.BATCH, 1, hidden_size))
    if vocabulary is None:
        root = ir.val(contract.ROOT_IDS, ir.DataType.INT64, (contract.BATCH, 1))
        levels = TreeGraph(graph, cell, candidates).levels(hidden, cell.embed(graph, root, 0))
    else:
        root = ir.val(contract.EMBEDDING, ir.DataType.FLOAT, (contract.BATCH, 1, hidden_size))
        levels = TreeGraph(graph, cell, candidates).levels(hidden, root)
    tokens = _joined(graph, [level.tokens for level in levels])
    if vocabulary is not None and vocabulary.token_map is not None:
        tokens = graph.node("Gather", [graph.constant("token_map", vocabulary.token_map), tokens])
    nodes = candidates + (cell.depth - 1) * candidates * min(BEAMS, candidates)
    outputs = [
        _output(tokens, contract.DRAFT_IDS, ir.DataType.INT64, nodes),
        _output(_joined(graph, [level.parents for level in levels]), contract.DRAFT_PARENTS, ir.DataType.INT64, nodes),
        _output(_joined(graph, [level.log_probs for level in levels]), contract.DRAFT_LOG_PROBS, ir.DataType.FLOAT, nodes),
    ]
    save_head(graph.model([hidden, root], outputs, "head"), target.folder / "head.onnx")
    return HeadInfo(
        name=target.name,
        family=family,
        dialect=dialect,
        hidden_size=hidden_size,
        vocab_size=target.model.vocab_size,
        heads=cell.depth,
        top_k=candidates,
        graph=described_graph(name, tensor_infos([hidden, root]), tensor_infos(outputs)),
        shared=shared or {},
        embeddings=vocabulary.table if vocabulary is not None else {},
    )


def looked_up(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """(Gather node, float table) wherever such a graph looks up what it drafted."""
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is not None and table.is_initializer() and table.dtype == ir.DataType.FLOAT and len(shape_of(table)) == 2:
            yield node, table


def _joined(graph: GraphBuilder, parts: Sequence[ir.Value]) -> ir.Value:
    return graph.node("Concat", parts, axis=1)


def _output(value: ir.Value, name: str, dtype: ir.DataType, nodes: int) -> ir.Value:
    value.name, value.dtype, value.shape = name, dtype, ir.Shape((contract.BATCH, nodes))
    return value

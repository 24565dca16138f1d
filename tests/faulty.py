"""Engines and drafters with one fault each, to show that `verify` reports it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from headstart.runtime.contract import POSITION_IDS
from headstart.runtime.drafters.base import DraftRequest
from headstart.runtime.tree import ROOT, DraftTree, empty_tree

# (positions [B, T], mask [B, T, T]) of a verify pass -> what is computed instead
Change = Callable[[Any, Any], tuple[Any, Any]]


class FaultyEngine:
    """An engine whose decoder is right on causal chains: only verify passes over trees, commits, or outputs have the fault."""

    def __init__(
        self,
        engine: Any,
        change: Change | None = None,
        slot_off: bool = False,
        poison: Callable[[Any], Any] = lambda outputs: outputs,
    ) -> None:
        self._engine = engine
        self._decoder = FaultyGraph(engine.graph("decoder"), change, slot_off, poison)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def graph(self, name: str) -> Any:
        return self._decoder if name == "decoder" else self._engine.graph(name)


class FaultyGraph:
    """A decoder with the fault."""

    def __init__(self, graph: Any, change: Change | None, slot_off: bool, poison: Callable[[Any], Any]) -> None:
        self._graph, self._change, self._slot_off, self._poison = graph, change, slot_off, poison

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)

    def new_state(self, *arguments: Any) -> Any:
        state = self._graph.new_state(*arguments)
        if self._slot_off:
            right = state.commit

            def commit(row: int, kept: Sequence[int]) -> None:
                """The last row that moves is taken from one slot further on."""
                moved = list(kept) != list(range(len(kept)))
                right(row, [*kept[:-1], kept[-1] + 1] if moved else kept)

            state.commit = commit
        return state

    def run(self, inputs: Any, state: Any = None, row_mask: Any = None) -> Any:
        causal = row_mask is None or (row_mask == np.tri(row_mask.shape[1], dtype=np.bool_)).all()
        if self._change is not None and not causal:
            positions, row_mask = self._change(inputs[POSITION_IDS].copy(), row_mask.copy())
            inputs = {**inputs, POSITION_IDS: positions}
        return self._poison(self._graph.run(inputs, state, row_mask))


def hide_one_ancestor(positions: Any, mask: Any) -> tuple[Any, Any]:
    """The last row that has a parent in the tree no longer sees its nearest ancestor."""
    for sequence in mask:
        rows = [row for row in range(len(sequence)) if sequence[row, :row].any()]
        if rows:
            sequence[rows[-1], np.flatnonzero(sequence[rows[-1], : rows[-1]])[-1]] = False
    return positions, mask


def show_one_stranger(positions: Any, mask: Any) -> tuple[Any, Any]:
    """The last row that could sees a row that is not its ancestor."""
    for sequence in mask:
        rows = [row for row in range(len(sequence)) if not sequence[row, :row].all()]
        if rows:
            sequence[rows[-1], np.flatnonzero(~sequence[rows[-1], : rows[-1]])[-1]] = True
    return positions, mask


def shift_positions(positions: Any, mask: Any) -> tuple[Any, Any]:
    """The tree stands one position too far to the right; its root does not."""
    positions[:, 1:] += 1
    return positions, mask


class LyingDrafter:
    """A drafter whose trees are changed after drawing."""

    def __init__(self, drafter: Any, change: Callable[[DraftTree], DraftTree]) -> None:
        self._drafter, self._change = drafter, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        return [self._change(tree) if len(tree) else tree for tree in self._drafter.propose(requests)]


class UniformNotClaimed:
    """Tokens drawn uniformly from what was possible, with the distribution from which they should have been drawn."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)

    def __call__(self, tree: DraftTree) -> DraftTree:
        assert tree.draft_probs is not None
        drawn = [self._generator.choice(np.flatnonzero(law)) for law in tree.draft_probs]
        return DraftTree(np.array(drawn, np.int64), tree.parents, tree.log_probs, tree.draft_probs, tree.classes)


def best_not_drawn(tree: DraftTree) -> DraftTree:
    """The most probable tokens, with the distribution from which they should have been drawn."""
    assert tree.draft_probs is not None
    best = tree.draft_probs.argmax(axis=1).astype(np.int64)
    return DraftTree(best, tree.parents, tree.log_probs, tree.draft_probs, tree.classes)


def kept_if_likely(tree: DraftTree) -> DraftTree:
    """Withdrawn unless what was drawn first is the most probable token: selection by what was drawn."""
    assert tree.draft_probs is not None
    return tree if tree.token_ids[0] == tree.draft_probs[0].argmax() else empty_tree()


class UniformDrafts:
    """An honest change, unlike the others: one token, drawn uniformly from what was possible, and said to be."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)

    def __call__(self, tree: DraftTree) -> DraftTree:
        assert tree.draft_probs is not None
        possible = np.flatnonzero(tree.draft_probs[0])
        probabilities = np.zeros((1, tree.draft_probs.shape[1]))
        probabilities[0, possible] = 1 / len(possible)
        token = self._generator.choice(possible, 1).astype(np.int64)
        return DraftTree(token, np.array([ROOT]), np.log(probabilities[:, token[0]]).astype(np.float32), probabilities)

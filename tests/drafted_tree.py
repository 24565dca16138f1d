"""Beam search as the graphs of recurrent heads unroll it, one path at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from headstart.exporter.heads.tree_graph import BEAMS
from headstart.runtime.tree import ROOT

Tree = list[tuple[int, int, float]]  # (token, parent, log-probability of the path) of each node


def searched(logits: Callable[[list[int]], Tensor], levels: int, candidates: int) -> Tree:
    """`logits` [V] after a path of drafted tokens, from the root on."""
    tree: Tree = []
    beams: list[tuple[int, float, list[int]]] = [(ROOT, 0.0, [])]
    for _ in range(levels):
        level: list[tuple[int, list[int]]] = []
        for node, above, path in beams:
            values, tokens = logits(path).log_softmax(-1).topk(candidates)
            for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
                level.append((len(tree), [*path, token]))
                tree.append((token, node, above + value))
        level.sort(key=lambda one: -tree[one[0]][2])
        beams = [(node, tree[node][2], path) for node, path in level[:BEAMS]]
    return tree


def assert_same_tree(outputs: Mapping[str, Any], row: int, tree: Tree, tokens: Sequence[int]) -> None:
    """`tokens`: the target's ids of the drafted vocabulary."""
    assert outputs["draft_ids"][row].tolist() == [tokens[token] for token, _, _ in tree]
    assert outputs["draft_parents"][row].tolist() == [parent for _, parent, _ in tree]
    np.testing.assert_allclose(outputs["draft_log_probs"][row], [path for _, _, path in tree], atol=1e-4)

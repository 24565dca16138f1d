"""Draft trees: geometry, pruning, and best-first growth against brute force."""

import itertools

import numpy as np
import pytest

from headstart.runtime.tree import ROOT, DraftTree, chain, empty_tree, tree_from_independent_levels


def sample_tree() -> DraftTree:
    #       root
    #      0    1
    #     2 3   4
    #     5
    parents = np.array([ROOT, ROOT, 0, 0, 1, 2])
    return DraftTree(np.arange(10, 16), parents, np.log(np.array([0.6, 0.3, 0.4, 0.1, 0.2, 0.35], np.float32)))


def test_geometry() -> None:
    tree = sample_tree()
    assert tree.depths().tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert tree.children() == [[0, 1], [2, 3], [4], [5], [], [], []]
    assert np.flatnonzero(tree.ancestor_mask()[6]).tolist() == [0, 1, 3, 6]
    assert np.flatnonzero(tree.ancestor_mask()[2]).tolist() == [0, 2]


def test_chain_is_causal() -> None:
    tree = chain([7, 8, 9], [-1.0, -2.0, -3.0])
    assert (tree.ancestor_mask() == np.tri(4, dtype=bool)).all()
    assert tree.log_probs.tolist() == [-1.0, -3.0, -6.0]


def test_empty_tree_is_one_row() -> None:
    assert len(empty_tree()) == 0
    assert empty_tree().ancestor_mask().tolist() == [[True]]
    assert empty_tree().children() == [[]]


def test_best_keeps_the_most_probable_closed_subtree() -> None:
    kept = sample_tree().best(nodes=4, max_depth=3)
    assert kept.token_ids.tolist() == [10, 11, 12, 15]
    assert kept.parents.tolist() == [ROOT, ROOT, 0, 2]


def test_best_respects_depth() -> None:
    kept = sample_tree().best(nodes=99, max_depth=1)
    assert kept.token_ids.tolist() == [10, 11]


def test_a_child_before_its_parent_is_refused() -> None:
    with pytest.raises(AssertionError):
        DraftTree(np.array([1, 2]), np.array([1, ROOT]), np.zeros(2, np.float32))


@pytest.mark.parametrize("seed", range(5))
def test_independent_levels_take_the_most_probable_paths(seed: int) -> None:
    generator = np.random.default_rng(seed)
    levels, width, nodes = 3, 4, 11
    probabilities = -np.sort(-generator.dirichlet(np.ones(width + 2), levels)[:, :width])
    tokens = generator.permutation(levels * width).reshape(levels, width)
    tree = tree_from_independent_levels(tokens, np.log(probabilities).astype(np.float32), nodes)
    totals = [
        sum(np.log(probabilities[level, rank]) for level, rank in enumerate(path))
        for depth in range(1, levels + 1)
        for path in itertools.product(range(width), repeat=depth)
    ]
    assert len(tree) == nodes
    np.testing.assert_allclose(tree.log_probs, sorted(totals, reverse=True)[:nodes], rtol=1e-5)
    for node in range(nodes):
        above = 0.0 if tree.parents[node] == ROOT else tree.log_probs[tree.parents[node]]
        level = tree.depths()[node + 1] - 1
        rank = tokens[level].tolist().index(tree.token_ids[node])
        assert abs(tree.log_probs[node] - above - np.log(probabilities[level, rank])) < 1e-5


def test_no_levels_no_tree() -> None:
    assert len(tree_from_independent_levels(np.empty((0, 3), np.int64), np.empty((0, 3), np.float32), 5)) == 0

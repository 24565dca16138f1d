"""Prompt lookup: what is copied, in which order, and that an index kept up to date equals one built anew."""

from typing import Any

import numpy as np
import pytest
from drafting import draft_request, opened

from headstart.runtime.drafters.base import DraftRequest
from headstart.runtime.drafters.ngram import BOUNDARY, NGramDrafter, NGramIndex
from headstart.runtime.tree import ROOT, DraftTree


def paths(tree: DraftTree) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for node, parent in enumerate(tree.parents.tolist()):
        above = () if parent == ROOT else found[parent]
        found.append((*above, int(tree.token_ids[node])))
    return set(found)


def proposals(drafter: NGramDrafter, *requests: DraftRequest) -> list[DraftTree]:
    trees: list[DraftTree] = opened(drafter, *requests).propose(requests)
    return trees


def propose(tokens: list[int], **limits: Any) -> DraftTree:
    return proposals(NGramDrafter(max_n=3), draft_request(tokens, **limits))[0]


def test_copies_what_followed_the_last_occurrence() -> None:
    tree = propose([1, 2, 3, 4, 5, 9, 1, 2, 3], nodes=3)
    assert tree.token_ids.tolist() == [4, 5, 9] and tree.parents.tolist() == [ROOT, 0, 1]


def test_longest_match_comes_first_and_others_branch() -> None:
    #                        a longer match ↓        a later, shorter one ↓
    tree = propose([7, 1, 2, 3, 10, 11, 5, 3, 20, 21, 6, 1, 2, 3], nodes=4)
    assert tree.token_ids[0] == 10
    assert (20,) in paths(tree)


def test_nothing_to_copy() -> None:
    assert len(propose([1, 2, 3, 4])) == 0
    assert len(propose([1])) == 0


def test_limits() -> None:
    tokens = [1, 2, 3] * 10
    assert len(propose(tokens, nodes=5)) == 5
    assert propose(tokens, depth=2).depths().max() == 2


@pytest.mark.parametrize("seed", range(10))
def test_grown_index_equals_a_new_one(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 4, 60).tolist()
    source = generator.integers(0, 4, 20 * (seed % 2)).tolist()
    grown = NGramIndex(3, 1, source)
    position = 0
    while position < len(tokens):
        position += int(generator.integers(1, 6))
        grown.update(tokens[:position])
    fresh = NGramIndex(3, 1, source)
    fresh.update(tokens)
    assert grown.matches(4) == fresh.matches(4)
    whole = [*source, BOUNDARY, *tokens] if source else tokens
    for start, size in fresh.matches(4):
        assert whole[start - size : start] == tokens[len(tokens) - size :]
    tree = propose(tokens, nodes=8, depth=6, source=source)
    children = tree.children()
    for siblings in children:
        names = [int(tree.token_ids[node]) for node in siblings]
        assert len(set(names)) == len(names), "siblings carry different tokens"
    for node, parent in enumerate(tree.parents.tolist()):
        assert parent == ROOT or tree.log_probs[node] <= tree.log_probs[parent]


def test_a_loop_is_copied_past_the_end_of_the_text() -> None:
    tree = propose([9, 1, 2, 1, 2, 1, 2], nodes=7)
    assert tree.token_ids.tolist()[:7] == [1, 2, 1, 2, 1, 2, 1]


def test_the_source_is_copied_up_to_its_end() -> None:
    tree = propose([0, 20, 11], nodes=8, source=[10, 11, 12, 13, 1])
    assert tree.token_ids.tolist() == [12, 13, 1] and tree.parents.tolist() == [ROOT, 0, 1]
    assert len(propose([0, 20, 1], source=[10, 11, 1])) == 0, "nothing follows the source's last token"
    assert propose([0, 20, 21], source=[21, 5, 20]).token_ids.tolist() == [5, 20]
    assert len(propose([7], source=[5, 6])) == 0, "source and text are not one text"


def test_source_and_text_are_branches_of_one_tree_and_classes_of_their_own() -> None:
    tree = propose([0, 5, 6, 7, 5, 6], nodes=6, source=[9, 6, 8, 1])
    assert tree.token_ids[0] == 7 and {(7,), (8,), (8, 1)} <= paths(tree)
    assert tree.classes is not None
    from_source = tree.classes >= NGramDrafter.class_count // 2
    assert {int(t) for t in tree.token_ids[from_source]} == {8, 1}
    longer = propose([0, 5, 6, 7, 5, 6], nodes=1, source=[7, 5, 6, 8, 1])
    assert longer.token_ids.tolist() == [8], "the longer match comes first, wherever it stands"


def test_measured_rates_replace_the_priors() -> None:
    drafter = NGramDrafter()
    drafter.use_rates([0.125] * drafter.class_count)
    tree = proposals(drafter, draft_request([5, 6, 7, 5, 6], nodes=2))[0]
    np.testing.assert_allclose(np.exp(tree.log_probs), [0.125, 0.125**2], rtol=1e-5)


def test_sequences_are_separate() -> None:
    first, second = proposals(NGramDrafter(), draft_request([1, 2, 1], row=0), draft_request([1, 3, 1], row=1))
    assert first.token_ids[0] == 2 and second.token_ids[0] == 3

"""Copies of an aligned text: what is proposed behind agreement, replacement, insertion, deletion and a jump."""

from collections.abc import Sequence

import numpy as np
import pytest
from drafting import draft_request, opened

from headstart.runtime.drafters.aligned_copy import (
    INSERTED,
    KINDS,
    REPLACED,
    AlignedCopyDrafter,
    Alignment,
    previous_hypothesis,
    source_copy,
)
from headstart.runtime.drafters.base import DraftRequest
from headstart.runtime.tree import ROOT, DraftTree

SOURCE = list(range(10, 30))
PROMPT = [2, 0]


def request(output: Sequence[int], nodes: int = 8, source: Sequence[int] = SOURCE, row: int = 0) -> DraftRequest:
    return draft_request([*PROMPT, *output], nodes, row=row, prompt_tokens=len(PROMPT), source=source)


def proposals(drafter: AlignedCopyDrafter, *requests: DraftRequest) -> list[DraftTree]:
    trees: list[DraftTree] = opened(drafter, *requests).propose(requests)
    return trees


def propose(output: Sequence[int], nodes: int = 8, source: Sequence[int] = SOURCE) -> DraftTree:
    return proposals(source_copy(), request(output, nodes, source))[0]


def first_tokens(tree: DraftTree) -> set[int]:
    return set(tree.token_ids[tree.parents == ROOT].tolist())


def test_agreement_is_copied_in_one_chain() -> None:
    tree = propose([10, 11, 12])
    assert tree.token_ids.tolist() == list(range(13, 21)) and tree.parents.tolist() == list(range(-1, 7))
    assert propose([10], nodes=3).token_ids.tolist() == [11, 12, 13], "one token is enough at the begin"
    assert len(propose([*SOURCE[:-1]])) == 1, "nothing stands behind the source's end"
    assert len(propose(SOURCE)) == 0


def test_the_prompt_is_no_output() -> None:
    tree = propose([2], source=[2, 0, 2, 5])
    assert tree.token_ids[0] == 0, "the output's 2 is the source's first"


def test_a_strange_token_replaced_one_or_was_inserted() -> None:
    assert first_tokens(propose([10, 11, 12, 99])) == {14, 13}
    assert propose([10, 11, 12, 99], nodes=2).token_ids.tolist() == [14, 15], "replacing is likelier"
    assert first_tokens(propose([10, 11, 12, 98, 99])) == {15, 13}


def test_a_skipped_token_is_found_behind_the_gap() -> None:
    tree = propose([10, 11, 14], nodes=3)
    assert tree.token_ids[0] == 15
    assert first_tokens(propose([10, 11, 14], nodes=8)) == {15, 13, 12}, "unless it was a stranger that looks alike"
    assert first_tokens(propose([10, 11, 14, 15, 16], nodes=8)) == {17}, "three tokens in a row leave no doubt"


def test_a_replaced_token_in_a_loop_is_not_sought_in_the_loop_s_beginning() -> None:
    source = [5] * 10 + [99] + [5] * 10
    assert {99, 5} <= first_tokens(propose([5] * 11, source=source))
    assert rounds_needed(source_copy(), source, [5] * 21) <= 6


def test_the_nearest_of_equal_matches_is_taken_and_the_longest_of_all() -> None:
    repeated = [5, 1, 6, 5, 2, 7, 5, 3, 8]
    alignment = Alignment(repeated)
    alignment.update([5, 1, 5])
    assert (alignment.position, alignment.run) == (4, 1), "the second 5 stands nearer than the third"
    alignment = Alignment(repeated)
    alignment.update([5, 1, 6, 99, 7, 5])
    assert (alignment.position, alignment.run) == (7, 2)


def test_far_astray_only_matches_count() -> None:
    assert len(propose([10, 11, *range(100, 120)])) == 0
    assert first_tokens(propose([10, 11, *range(100, 120), 20])) == {21}


def edited(generator: np.random.Generator, edits: int) -> tuple[list[int], list[int]]:
    """A source without repetition, and a copy with single-token edits at least six tokens apart."""
    source = generator.permutation(np.arange(10, 110)).tolist()
    output = list(source)
    for place in sorted(generator.choice(15, edits, replace=False).tolist(), reverse=True):
        kind, at = generator.integers(3), 6 * place + 3
        output[at : at + (kind != 0)] = [] if kind == 1 else [200 + place]
    return source, output


def rounds_needed(drafter: AlignedCopyDrafter, source: list[int], output: list[int]) -> int:
    """Verify passes until the output stands, when the target's own tokens are the output's."""
    opened(drafter, request([], source=source))
    done, rounds = 1, 0
    while done < len(output):
        tree = drafter.propose([request(output[:done], 12, source)])[0]
        children, row = tree.children(), 0
        while done < len(output):
            node = next((n for n in children[row] if tree.token_ids[n] == output[done]), None)
            done += 1
            if node is None:
                break
            row = node + 1
        rounds += 1
    return rounds


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("edits", [0, 3, 10])
def test_an_edit_costs_two_rounds_at_most(edits: int, seed: int) -> None:
    source, output = edited(np.random.default_rng(seed), edits)
    assert rounds_needed(source_copy(), source, output) <= 1 + len(output) // 9 + 2 * edits


@pytest.mark.parametrize("seed", range(10))
def test_growing_by_rounds_equals_growing_at_once(seed: int) -> None:
    generator = np.random.default_rng(seed)
    source, output = generator.integers(0, 6, 40).tolist(), generator.integers(0, 7, 60).tolist()
    grown, done = Alignment(source), 0
    while done < len(output):
        done += int(generator.integers(1, 6))
        grown.update(output[:done])
        fresh = Alignment(source)
        fresh.update(output[:done])
        assert grown.branches(9) == fresh.branches(9)
        if grown.run:
            assert source[grown.position - grown.run : grown.position] == output[:done][-grown.run :]


def test_measured_rates_order_the_branches() -> None:
    drafter = source_copy()
    rates = np.array(drafter.prior_rates()).reshape(len(KINDS), -1)
    rates[REPLACED], rates[INSERTED] = 0.1, 0.9
    drafter.use_rates(rates.reshape(-1).tolist())
    assert proposals(drafter, request([10, 11, 12, 99], nodes=2))[0].token_ids.tolist() == [13, 14]


def test_sequences_and_texts_are_separate() -> None:
    first, second = proposals(source_copy(), request([10], row=0), request([20], row=1, source=[20, 30]))
    assert first.token_ids[0] == 11 and second.token_ids.tolist() == [30]
    assert len(proposals(previous_hypothesis(), request([10]))[0]) == 0, "no hypothesis yet"


def test_an_unsure_match_is_not_the_only_one_tried() -> None:
    source = [10, 11, 7, 20, 21, 22, 7, 30, 31]
    assert first_tokens(propose([10, 11, 90, 91, 7], nodes=16, source=source)) >= {20, 30}
    assert 30 not in first_tokens(propose([10, 11, 7], source=source)), "the output never went astray"

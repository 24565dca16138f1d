"""The budget: the best part of each tree under a cost curve, rest where drafting does not pay, and shadows."""

import numpy as np
import pytest
from numpy.typing import NDArray

from headstart.runtime.budget import (
    GAIN,
    SHADOW_PROOF,
    SHORTEST_REST,
    WINDOW,
    Budget,
    Draft,
    DrafterStats,
    Shadow,
    share,
)
from headstart.runtime.graph import MAX_ROWS
from headstart.runtime.tree import ROOT, DraftTree, chain

FLAT = np.ones(MAX_ROWS + 1)
LINEAR = np.arange(MAX_ROWS + 1.0)
RISING = np.interp(np.arange(MAX_ROWS + 1), (1, MAX_ROWS), (1.0, 20.0))


def sure_chain(probability: float, nodes: int) -> DraftTree:
    return chain(list(range(nodes)), [float(np.log(probability))] * nodes)


def budget_of(draft_ms: float = 0.0, stats: DrafterStats | None = None) -> Budget:
    return Budget(lambda nodes, depth: draft_ms, 16, stats or DrafterStats())


def cut(budget: Budget, tree: DraftTree, curve: NDArray[np.float64]) -> int:
    return len(share([Draft(tree, budget)], curve)[0])


def observe(budget: Budget, tokens: int, nodes: int, drafted: bool, curve: NDArray[np.float64] = LINEAR) -> None:
    budget.observe(tokens, float(curve[1 + nodes]), float(curve[1]), drafted)


def test_free_rows_are_all_used_and_expensive_ones_are_not() -> None:
    tree = sure_chain(0.5, 8)
    assert cut(budget_of(), tree, FLAT) == 8
    assert cut(budget_of(), tree, LINEAR) == 0


@pytest.mark.parametrize("seed", range(20))
def test_the_cut_is_the_best_prefix_by_exhaustion(seed: int) -> None:
    generator = np.random.default_rng(seed)
    milliseconds = np.maximum.accumulate(generator.uniform(1, 4, 6))
    curve = np.interp(np.arange(MAX_ROWS + 1), (1, 2, 4, 8, 16, 64), milliseconds)
    tree = sure_chain(float(generator.uniform(0.3, 0.95)), 20)
    draft_ms = float(generator.uniform(0, 1))
    probabilities = np.exp(tree.log_probs.astype(np.float64))
    rates = [(1 + probabilities[:n].sum()) / (curve[1 + n] + draft_ms) for n in range(21)]
    wanted = int(np.argmax(rates)) if max(rates) >= GAIN * rates[0] else 0
    assert cut(budget_of(draft_ms), tree, curve) == wanted


@pytest.mark.parametrize("seed", range(20))
def test_sequences_share_the_number_of_rows_that_brings_the_most_tokens_of_all(seed: int) -> None:
    """By exhaustion over the number of rows: a pass has equally many for each sequence."""
    generator = np.random.default_rng(seed)
    curve = np.cumsum(generator.uniform(0.0, 0.4, MAX_ROWS + 1)) + 1.0
    trees = [sure_chain(float(generator.uniform(0.1, 0.95)), int(generator.integers(1, 12))) for _ in range(4)]
    drafts = [Draft(tree, budget_of()) for tree in trees]
    sums = [np.concatenate([[0.0], np.cumsum(np.exp(tree.log_probs.astype(np.float64)))]) for tree in trees]
    most = max(map(len, trees))
    rates = [sum(1 + s[min(n, len(s) - 1)] for s in sums) / curve[1 + n] for n in range(most + 1)]
    wanted = int(np.argmax(rates)) if max(rates) >= GAIN * rates[0] else 0
    assert [len(tree) for tree in share(drafts, curve)] == [min(wanted, len(tree)) for tree in trees]


def test_rests_when_drafting_does_not_pay_and_tries_again_later() -> None:
    budget = budget_of(0.5)
    for length in (SHORTEST_REST, 2 * SHORTEST_REST):  # the second rest in a row is longer
        for _ in range(WINDOW):
            assert not budget.resting
            observe(budget, 1, 4, drafted=True)
        rounds = 0
        while budget.resting:
            observe(budget, 1, 0, drafted=False)
            rounds += 1
        assert rounds == length


def test_a_drafter_that_pays_never_rests() -> None:
    budget = budget_of(0.1)
    for _ in range(10 * WINDOW):
        observe(budget, 3, 4, drafted=True, curve=FLAT)
        assert not budget.resting


def test_sampled_drafts_are_never_cut() -> None:
    """What was drawn must not decide what is verified: the output's distribution would be biased."""
    drawn = sure_chain(0.1, 4)
    drawn = DraftTree(drawn.token_ids, drawn.parents, drawn.log_probs, np.full((4, 8), 0.125))
    assert cut(budget_of(), drawn, LINEAR) == 4
    other = Draft(sure_chain(0.9, 12), budget_of())
    trees = share([Draft(drawn, budget_of()), other], LINEAR)
    assert [len(tree) for tree in trees] == [4, 4], "rows that a drawn draft takes anyway are free for the others"


def test_broken_promises_are_trusted_less_and_forgotten_in_time() -> None:
    tree, budget = sure_chain(0.9, 8), budget_of()
    trusted = cut(budget, tree, RISING)
    sizes = []
    for _ in range(WINDOW - 1):
        sizes.append(cut(budget, tree, RISING))
        observe(budget, 1, sizes[-1], drafted=True, curve=RISING)
    assert trusted and sizes[-1] == 0, "nothing was ever accepted, so nothing should be drafted"
    for _ in range(100):
        budget.stats.record.add(0, 0)
    assert cut(budget, tree, RISING) == trusted, "an old failure is forgotten"


def test_promises_that_are_more_than_kept_grow_the_tree() -> None:
    tree, budget = sure_chain(0.3, 12), budget_of()
    assert cut(budget, tree, RISING) == 0
    for _ in range(20):
        cut(budget, tree, RISING)
        budget.stats.record.add(1.0, 3.0)
    assert cut(budget, tree, RISING) > 0


def test_the_next_text_begins_with_what_the_last_one_showed() -> None:
    stats = DrafterStats()
    first = budget_of(0.5, stats)
    for _ in range(WINDOW):
        observe(first, 1, 4, drafted=True)
    assert budget_of(0.5, stats).resting


def test_a_shadow_counts_what_would_have_been_accepted() -> None:
    #        10 ── 12 ── 13
    # root ─┤
    #        11
    tree = DraftTree(
        np.array([10, 11, 12, 13]), np.array([ROOT, ROOT, 0, 2]), np.log([0.5, 0.25, 0.25, 0.125]).astype(np.float32)
    )
    shadow = Shadow(tree, known=3)
    text = [1, 2, 3]
    assert not shadow.follow(text)
    assert not shadow.follow([*text, 10]) and shadow.accepted == 1
    assert shadow.follow([*text, 10, 99]) and shadow.accepted == 1
    assert shadow.promised == pytest.approx(1.125)
    whole = Shadow(tree, known=3)
    assert whole.follow([*text, 10, 12, 13]) and whole.accepted == 3, "a leaf is reached: nothing more can be accepted"


def test_an_untuned_drafter_stays_in_the_shadow_until_it_has_shown_what_it_is_worth() -> None:
    budget, tree = budget_of(stats=DrafterStats(proven=False)), sure_chain(0.9, 4)
    text, rounds = [0], 0
    while budget.resting:
        if budget.wants_shadow(text):
            budget.shadow(tree, text, plain_ms=1.0)
        text.append(99)  # never what was proposed
        observe(budget, 1, 0, drafted=False)
        rounds += 1
    assert rounds >= SHADOW_PROOF / 4
    assert cut(budget, tree, RISING) == 0, "it was always wrong, and that is known without having verified anything"


def test_shadows_of_an_expensive_drafter_are_rare() -> None:
    budget, proposals = budget_of(0.5, DrafterStats(proven=False)), 0
    for count in range(1, 200):
        if budget.wants_shadow([0] * count):
            proposals += 1
            budget.shadow(sure_chain(0.9, 4), [0] * count, plain_ms=1.0)
    assert proposals <= 5, "0.5 ms every 50 rounds of 1 ms are 1 %"

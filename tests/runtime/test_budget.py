"""The budget: the best part of a tree under a cost curve, and rest where drafting does not pay."""

import numpy as np
import pytest

from headstart.runtime.budget import GAIN, SHORTEST_REST, WINDOW, Budget, Standing, VerifyCost
from headstart.runtime.tree import DraftTree, chain

FLAT = VerifyCost((1, 64), (0, 1000), ((1.0, 1.0), (1.0, 1.0)))
LINEAR = VerifyCost((1, 64), (0, 1000), ((1.0, 64.0), (1.0, 64.0)))


def sure_chain(probability: float, nodes: int) -> DraftTree:
    return chain(list(range(nodes)), [float(np.log(probability))] * nodes)


def test_free_rows_are_all_taken_and_dear_ones_are_not() -> None:
    tree = sure_chain(0.5, 8)
    assert len(Budget(FLAT, 0.0, 16).cut(tree, 10)) == 8
    assert len(Budget(LINEAR, 0.0, 16).cut(tree, 10)) == 0


@pytest.mark.parametrize("seed", range(20))
def test_cut_is_the_best_prefix_by_exhaustion(seed: int) -> None:
    generator = np.random.default_rng(seed)
    milliseconds = np.maximum.accumulate(generator.uniform(1, 4, 6))
    cost = VerifyCost((1, 2, 4, 8, 16, 64), (0, 1000), (tuple(milliseconds), tuple(milliseconds)))
    tree = sure_chain(float(generator.uniform(0.3, 0.95)), 20)
    draft_ms = float(generator.uniform(0, 1))
    curve, probabilities = cost.curve(0), np.exp(tree.log_probs.astype(np.float64))
    rates = [(1 + probabilities[:n].sum()) / (curve[1 + n] + draft_ms) for n in range(21)]
    wanted = int(np.argmax(rates)) if max(rates) >= GAIN * rates[0] else 0
    assert len(Budget(cost, draft_ms, 32).cut(tree, 0)) == wanted


def test_cost_follows_the_history() -> None:
    cost = VerifyCost((1, 2), (0, 100), ((1.0, 2.0), (3.0, 4.0)))
    assert cost.curve(50)[1] == pytest.approx(2.0) and cost.curve(1000)[2] == pytest.approx(4.0)


def test_rests_when_drafting_does_not_pay_and_tries_again_later() -> None:
    budget = Budget(LINEAR, 0.5, 16)
    for _ in range(WINDOW):
        assert not budget.resting
        budget.observe(1, 4, 10, drafted=True)
    rounds = 0
    while budget.resting:
        budget.observe(1, 0, 10, drafted=False)
        rounds += 1
    assert rounds == SHORTEST_REST
    for _ in range(WINDOW):
        budget.observe(1, 4, 10, drafted=True)
    rounds = 0
    while budget.resting:
        budget.observe(1, 0, 10, drafted=False)
        rounds += 1
    assert rounds == 2 * SHORTEST_REST, "the second rest in a row is longer"


def test_a_drafter_that_pays_never_rests() -> None:
    budget = Budget(FLAT, 0.1, 16)
    for _ in range(10 * WINDOW):
        budget.observe(3, 4, 10, drafted=True)
        assert not budget.resting


def test_sampled_drafts_are_never_cut() -> None:
    """What was drawn must not decide what is verified: the output's distribution would bend."""
    drawn = sure_chain(0.1, 4)
    drawn = DraftTree(drawn.token_ids, drawn.parents, drawn.log_probs, np.full((4, 8), 0.125))
    assert len(Budget(LINEAR, 0.0, 16).cut(drawn, 10)) == 4


def test_promises_that_are_not_kept_are_believed_less_and_forgotten_in_time() -> None:
    tree = sure_chain(0.9, 8)
    budget = Budget(VerifyCost((1, 64), (0, 1000), ((1.0, 20.0), (1.0, 20.0))), 0.0, 16)
    believed = len(budget.cut(tree, 10))
    sizes = []
    for _ in range(WINDOW - 1):
        sizes.append(len(budget.cut(tree, 10)))
        budget.observe(1, sizes[-1], 10, drafted=True)
    assert believed and sizes[-1] == 0, "nothing was ever accepted, so nothing should be drafted"
    for _ in range(100):
        budget.standing.record.add(0, 0)
    assert len(budget.cut(tree, 10)) == believed, "an old failure is forgotten"


def test_promises_that_are_more_than_kept_grow_the_tree() -> None:
    tree, budget = sure_chain(0.3, 12), Budget(VerifyCost((1, 64), (0, 1000), ((1.0, 20.0), (1.0, 20.0))), 0.0, 16)
    assert len(budget.cut(tree, 10)) == 0
    for _ in range(20):
        budget.cut(tree, 10)
        budget.standing.record.add(1.0, 3.0)
    assert len(budget.cut(tree, 10)) > 0


def test_the_next_text_begins_with_what_the_last_one_showed() -> None:
    standing = Standing()
    first = Budget(LINEAR, 0.5, 16, standing)
    for _ in range(WINDOW):
        first.observe(1, 4, 10, drafted=True)
    assert Budget(LINEAR, 0.5, 16, standing).resting

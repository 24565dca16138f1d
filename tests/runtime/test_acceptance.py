"""Losslessness proved, not sampled: every outcome of the production code is enumerated with its probability.

A tiny vocabulary, a random target, random drafts. The law of the first tokens that come out (the target continuing by
itself where a round ends early) must be the target's own. A round that is lossless after any text makes every text so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from enumeration import (
    CONTEXT,
    SAMPLED,
    Replay,
    Target,
    distance,
    drawn_chain,
    drawn_tree,
    law_of,
    outcomes,
    random_tree,
)
from numpy.typing import NDArray

from headstart.runtime.acceptance import RULES, Accepted, NumpyRng, Rule, accept, check_rule, prune, rule_for
from headstart.runtime.drafters.base import DraftRequest, DraftSequence
from headstart.runtime.drafters.cascade import Cascade, promised
from headstart.runtime.errors import OptionError
from headstart.runtime.graph import HostScores
from headstart.runtime.rules import (
    ForcedTokens,
    LogitRule,
    MinLength,
    NoRepeatNGram,
    SuppressedTokens,
    WhisperTimestamps,
)
from headstart.runtime.sampling import LogitRules, SamplingOptions
from headstart.runtime.tree import ROOT, DraftTree, chain, empty_tree

EXACT = 1e-9  # total variation: rounding


# --- The proof: every rule × every kind of draft and composite × logit rules, pruning and end tokens.


class ToyDrafter:
    """One of a pair. Its drafts come from a function, and do not look at the request."""

    name, default_nodes, class_count = "toy", 4, 0
    reads: frozenset[str] = frozenset()

    def __init__(self, draw: Callable[[], DraftTree]) -> None:
        self._draw = draw

    def open(self, sequence: DraftSequence, target: Any) -> None: ...

    def observe(self, sequence: DraftSequence, rows: Any, path: Sequence[int]) -> None: ...

    def price(self, nodes: int, depth: int) -> float:
        return 0.0

    def close(self, sequence: DraftSequence) -> None: ...

    def prior_rates(self) -> list[float]:
        return []

    def use_rates(self, rates: Sequence[float]) -> None: ...

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        return [self._draw() for _ in requests]


ANY_REQUEST: Any = None
VOCABULARY = 3


@dataclass(frozen=True)
class Drafts:
    """What a round's drafts are made of."""

    tables: Target  # what drawn drafts are drawn from
    tree: DraftTree  # a deterministic one
    enough: float = 2.0  # of a pair

    def deterministic(self, rng: Replay) -> DraftTree:
        return self.tree

    def single(self, rng: Replay) -> DraftTree:
        return drawn_chain(rng, self.tables, SAMPLED, 1)

    def block(self, rng: Replay) -> DraftTree:
        return drawn_chain(rng, self.tables, SAMPLED, 3)

    def siblings(self, rng: Replay) -> DraftTree:
        return drawn_tree(rng, self.tables, (2, 1))

    def pair(self, rng: Replay, first: "Draw", second: "Draw", pair: type[Cascade] = Cascade) -> DraftTree:
        drafters = [ToyDrafter(lambda draw=draw: draw(self, rng)) for draw in (first, second)]
        return pair(*drafters, enough=self.enough).propose([ANY_REQUEST])[0]


Draw = Callable[[Drafts, Replay], DraftTree]
DRAFTS: dict[str, Draw] = {
    "nothing": lambda drafts, rng: empty_tree(),
    "deterministic tree": Drafts.deterministic,
    "one drawn token": Drafts.single,
    "drawn chain": Drafts.block,
    "drawn siblings": Drafts.siblings,
    "deterministic, then drawn": lambda drafts, rng: drafts.pair(rng, Drafts.deterministic, Drafts.block),
    "deterministic, then siblings": lambda drafts, rng: drafts.pair(rng, Drafts.deterministic, Drafts.siblings),
    "drawn, then deterministic": lambda drafts, rng: drafts.pair(rng, Drafts.single, Drafts.deterministic),
    "drawn, then drawn": lambda drafts, rng: drafts.pair(rng, Drafts.single, Drafts.block),
    "nothing, then drawn": lambda drafts, rng: drafts.pair(rng, DRAFTS["nothing"], Drafts.block),
}


def some_drafts(seed: int, enough: float = 2.0) -> Drafts:
    """The deterministic tree promises 1.5 tokens, which drawn drafts exceed or miss by what was drawn."""
    generator = np.random.default_rng(100 + seed)
    tree = random_tree(generator, VOCABULARY, 4)
    return Drafts(
        Target(generator, VOCABULARY), replace(tree, log_probs=np.log([0.4, 0.05, 0.03, 0.02]).astype(np.float32)), enough
    )


@dataclass(frozen=True)
class Setting:
    """What a text demands, and whether drafts are pruned by it."""

    rules: tuple[LogitRule, ...] = ()
    pruned: bool = False
    ends: frozenset[int] = frozenset()


TINY_RULES = (SuppressedTokens((2,), 2), SuppressedTokens((1,), 3), NoRepeatNGram(2))
SETTINGS = {
    "plain": Setting(),
    "logit rules": Setting(TINY_RULES),
    "logit rules, pruned": Setting(TINY_RULES, pruned=True),
    "end tokens": Setting(ends=frozenset({1})),
    "pruned, end tokens": Setting((NoRepeatNGram(2), MinLength(4, (2,))), pruned=True, ends=frozenset({2})),
}


def options_of(rule: Rule) -> SamplingOptions:
    return SamplingOptions(temperature=0.0 if rule.greedy else 1.0)


def deviation(
    draw: Draw,
    drafts: Drafts,
    options: SamplingOptions,
    setting: Setting,
    seed: int = 0,
    wanted: str | None = None,
    cut: Callable[..., DraftTree] = prune,
) -> float:
    """How far the law of a round of production code is from the target's. `wanted` is used where it fits the draft."""
    target, rules = Target(np.random.default_rng(seed), VOCABULARY), LogitRules(options, setting.rules)
    state = rules.start(CONTEXT)

    def experiment(rng: Replay) -> Accepted:
        tree = draw(drafts, rng)
        tree = cut(tree, state) if setting.pruned else tree
        named = wanted if wanted and RULES[wanted].fits(tree, state) else None
        return accept(tree, target.rows(tree), state, rng, setting.ends, named)

    law, _ = law_of(experiment, target, rules, 3, setting.ends)
    return distance(law, target.law(rules, 3, ends=setting.ends))


def fits(rule: Rule, draw: Draw) -> bool:
    """Whether it fits any outcome of the draft."""
    state = LogitRules(options_of(rule)).start(CONTEXT)
    return any(rule.fits(tree, state) for _, tree in outcomes(lambda rng: draw(some_drafts(0, 9.0), rng)))


FITTING = [(rule.name, kind) for rule in RULES.values() for kind in DRAFTS if fits(rule, DRAFTS[kind])]
LOSSLESS = [(name, kind) for name, kind in FITTING if RULES[name].lossless]
LOSSY = [rule.name for rule in RULES.values() if not rule.lossless]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("name", "kind"), LOSSLESS)
def test_every_lossless_rule_keeps_the_target_s_distribution(name: str, kind: str, setting: str) -> None:
    """For pairs, both where the first draft promises too little and where it promises enough."""
    for seed, enough in enumerate((2.0, 1.2) if "then" in kind else (2.0,)):
        drafts = some_drafts(seed, enough)
        assert deviation(DRAFTS[kind], drafts, options_of(RULES[name]), SETTINGS[setting], seed, name) < EXACT


def test_the_proof_meets_every_rule_and_both_outcomes_of_a_pair() -> None:
    assert {name for name, _ in FITTING} == set(RULES)
    for kind in ("deterministic, then drawn", "deterministic, then siblings"):
        for seed, (enough, drawn) in enumerate([(2.0, True), (1.2, False)]):
            trees = [tree for _, tree in outcomes(lambda rng: DRAFTS[kind](some_drafts(seed, enough), rng))]  # noqa: B023
            assert {tree.draft_probs is not None for tree in trees} == {drawn}


@pytest.mark.parametrize("kind", [kind for kind in DRAFTS if kind != "nothing"])
@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_rule_is_seen_to_be_lossy(name: str, kind: str) -> None:
    """So the proof can fail, for every kind of draft."""
    found = [deviation(DRAFTS[kind], some_drafts(seed), options_of(RULES[name]), Setting(), seed, name) for seed in range(3)]
    assert max(found) > 0.01


def test_always_accepting_what_was_drafted_is_seen_to_be_lossy() -> None:
    target, drafts = Target(np.random.default_rng(0), VOCABULARY), some_drafts(0)

    def gullible(rng: Replay) -> Accepted:
        tree = drafts.block(rng)
        return Accepted([0, 1, 2], [*tree.token_ids.tolist(), rng.choose(target.probabilities(tuple(tree.token_ids.tolist())))])

    law, _ = law_of(gullible, target, SAMPLED, 3)
    assert distance(law, target.law(SAMPLED, 3)) > 0.05


class ChoosesByWhatWasDrawn(Cascade):
    """The pair as it once was: a draft is used or not by what was drawn."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        trees = self._first.propose(requests)
        for i, tree in enumerate(trees):
            if promised(tree) < self._enough:
                (other,) = self._second.propose([requests[i]])
                trees[i] = other if promised(other) > promised(tree) else tree
        return trees


PAIRS: dict[str, tuple[Draw, Draw]] = {
    "deterministic, then drawn": (Drafts.deterministic, Drafts.block),
    "deterministic, then siblings": (Drafts.deterministic, Drafts.siblings),
    "drawn, then deterministic": (Drafts.single, Drafts.deterministic),
    "drawn, then drawn": (Drafts.single, Drafts.block),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_choosing_a_draft_by_what_was_drawn_is_seen_to_be_biased(kind: str) -> None:
    first, second = PAIRS[kind]
    sampled = SamplingOptions(temperature=1.0)

    def largest(pair: type[Cascade]) -> float:
        def draw(drafts: Drafts, rng: Replay) -> DraftTree:
            return drafts.pair(rng, first, second, pair)

        return max(deviation(draw, some_drafts(seed, 1.6), sampled, Setting(), seed) for seed in range(4))

    assert largest(ChoosesByWhatWasDrawn) > 0.01
    assert largest(Cascade) < EXACT


@pytest.mark.parametrize(("pair", "expected"), [(ChoosesByWhatWasDrawn, [0.84, 0.16]), (Cascade, [0.6, 0.4])])
@pytest.mark.parametrize("drawn_first", [False, True])
def test_the_pair_of_the_review(pair: type[Cascade], expected: list[float], drawn_first: bool) -> None:
    """Draft and target distribution are both (0.6, 0.4); the deterministic draft is token 0, believed at 0.5."""
    same = Target(np.random.default_rng(0), 2)
    same.table = {path: np.log([0.6, 0.4]) for length in range(3) for path in product(range(2), repeat=length)}
    drafts = Drafts(same, chain([0], [float(np.log(0.5))]), 1.55)
    order = (Drafts.single, Drafts.deterministic) if drawn_first else (Drafts.deterministic, Drafts.single)
    state = SAMPLED.start(CONTEXT)

    def experiment(rng: Replay) -> Accepted:
        tree = drafts.pair(rng, *order, pair)
        return accept(tree, same.rows(tree), state, rng)

    law, _ = law_of(experiment, same, SAMPLED, 1)
    assert [law[(0,)], law[(1,)]] == pytest.approx(expected)


def prune_any(tree: DraftTree, logits: Any) -> DraftTree:
    """`prune`, for drawn drafts too."""
    kept = prune(replace(tree, draft_probs=None, classes=np.arange(len(tree))), logits).classes
    assert kept is not None
    return tree.subtree(kept.tolist())


@pytest.mark.parametrize("kind", ["one drawn token", "drawn chain", "drawn siblings"])
def test_pruning_a_drawn_draft_is_seen_to_be_biased(kind: str) -> None:
    setting, sampled = SETTINGS["logit rules, pruned"], SamplingOptions(temperature=1.0)

    def largest(cut: Callable[..., DraftTree]) -> float:
        return max(deviation(DRAFTS[kind], some_drafts(seed), sampled, setting, seed, cut=cut) for seed in range(3))

    assert largest(prune_any) > 0.01
    assert largest(prune) < EXACT


# --- Warpers and the logit rules of a text.

WARPS = {
    "plain": SamplingOptions(temperature=1.0),
    "cold": SamplingOptions(temperature=0.5),
    "top_k": SamplingOptions(temperature=1.3, top_k=2),
    "top_p": SamplingOptions(temperature=1.0, top_p=0.7),
    "min_p": SamplingOptions(temperature=1.0, min_p=0.3),
    "penalty": SamplingOptions(temperature=1.0, repetition_penalty=1.7),
    "no_repeat": SamplingOptions(temperature=1.0, no_repeat_ngram=2),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("warp", WARPS)
def test_deterministic_trees_are_lossless(warp: str, seed: int) -> None:
    generator, rules = np.random.default_rng(seed), LogitRules(WARPS[warp])
    target, state = Target(generator, 4), rules.start(CONTEXT)
    tree = random_tree(generator, 4, 5)
    law, _ = law_of(lambda rng: accept(tree, target.rows(tree), state, rng), target, rules, 3)
    assert distance(law, target.law(rules, 3)) < EXACT


# Rules of a text, on a vocabulary of six: in the last set 0 and 1 are text, 2 ends, 3 is <|notimestamps|>, 4 and 5 are times.
TEXT_RULES: dict[str, list[LogitRule]] = {
    "forced": [ForcedTokens(3, (2,)), ForcedTokens(4, (0, 1))],
    "suppressed": [SuppressedTokens((1, 4)), SuppressedTokens((0, 5), position=2)],
    "lengths": [MinLength(4, (2, 3)), ForcedTokens(5, (2,)), NoRepeatNGram(2)],
    "timestamps": [SuppressedTokens((1,), position=3), WhisperTimestamps(3, 2, 2, 0)],
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", TEXT_RULES)
@pytest.mark.parametrize("kind", ["tree", "pruned tree", "chain", "siblings"])
def test_drafts_that_know_no_rules_are_lossless(kind: str, name: str, seed: int) -> None:
    """Whatever is drafted against the rules of a text is rejected; the law is that of the target under them."""
    generator = np.random.default_rng(seed)
    rules = LogitRules(SamplingOptions(temperature=1.0), TEXT_RULES[name])
    target, drafts = Target(generator, 6), Target(generator, 6)
    noise, state = random_tree(generator, 6, 7), rules.start(CONTEXT)

    def experiment(rng: Replay) -> Accepted:
        if kind.endswith("tree"):
            tree = prune(noise, state) if "pruned" in kind else noise
        else:
            tree = drawn_chain(rng, drafts, SAMPLED, 2) if kind == "chain" else drawn_tree(rng, drafts, (2, 1))
        return accept(tree, target.rows(tree), state, rng)

    law, _ = law_of(experiment, target, rules, 3)
    assert distance(law, target.law(rules, 3)) < EXACT
    unruled = target.law(SAMPLED, 3)
    assert distance(law, unruled) > 0.05, "the rules forbade something"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("wanted", ["block", "without_replacement", "deterministic", None])
@pytest.mark.parametrize("warp", ["plain", "top_k", "penalty"])
def test_drawn_chains_are_lossless(wanted: str | None, warp: str, seed: int) -> None:
    generator, rules = np.random.default_rng(seed), LogitRules(WARPS[warp])
    target, drafts = Target(generator, 3), Target(generator, 3)
    state = rules.start(CONTEXT)

    def experiment(rng: Replay) -> Accepted:
        tree = drawn_chain(rng, drafts, rules, 3)
        return accept(tree, target.rows(tree), state, rng, wanted=wanted)

    law, _ = law_of(experiment, target, rules, 4)
    assert distance(law, target.law(rules, 4)) < EXACT


def mean_length(wanted: str, draw: Callable[[Replay], DraftTree], target: Target) -> float:
    state = SAMPLED.start(CONTEXT)

    def experiment(rng: Replay) -> Accepted:
        tree = draw(rng)
        return accept(tree, target.rows(tree), state, rng, wanted=wanted)

    return law_of(experiment, target, SAMPLED, 1)[1]


@pytest.mark.parametrize("seed", range(8))
def test_the_default_is_never_the_shorter_one(seed: int) -> None:
    """Block verification accepts at least as much as token by token, and that as much as a draw that ignores the drafts."""
    generator = np.random.default_rng(seed)
    target, drafts = Target(generator, 3), Target(generator, 3)
    names = ["block", "without_replacement", "deterministic"]
    lengths = [mean_length(name, lambda rng: drawn_chain(rng, drafts, SAMPLED, 3), target) for name in names]
    assert lengths[0] >= lengths[1] - 1e-12 and lengths[1] >= lengths[2] - 1e-12


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("widths", [(2,), (3,), (2, 1), (1, 2)])
def test_trees_drawn_without_replacement_are_lossless(widths: tuple[int, ...], seed: int) -> None:
    generator = np.random.default_rng(seed)
    target, drafts = Target(generator, 4), Target(generator, 4)
    state = SAMPLED.start(CONTEXT)

    def experiment(rng: Replay) -> Accepted:
        tree = drawn_tree(rng, drafts, widths)
        return accept(tree, target.rows(tree), state, rng, wanted="without_replacement")

    law, _ = law_of(experiment, target, SAMPLED, 3)
    assert distance(law, target.law(SAMPLED, 3)) < EXACT


# --- The table, and single rules.


def test_the_table_is_keyed_by_name_and_cites_its_sources() -> None:
    assert all(name == rule.name and rule.source.startswith("arXiv") for name, rule in RULES.items())


@pytest.mark.parametrize(
    ("kind", "default"),
    [
        ("nothing", "block"),
        ("deterministic tree", "deterministic"),
        ("one drawn token", "block"),
        ("drawn chain", "block"),
        ("drawn siblings", "without_replacement"),
    ],
)
def test_the_default_rule_of_each_draft(kind: str, default: str) -> None:
    _, tree = next(outcomes(lambda rng: DRAFTS[kind](some_drafts(0), rng)))
    assert rule_for(tree, SAMPLED.start(CONTEXT)).name == default
    assert rule_for(tree, LogitRules(SamplingOptions()).start(CONTEXT)).name == "greedy"


@pytest.mark.parametrize(
    ("kind", "wanted", "temperature", "message"),
    [
        (
            "drawn siblings",
            "block",
            1.0,
            r"'block' needs a chain of drawn .* is a drawn tree of 4 nodes\. .*without_replacement",
        ),
        (
            "deterministic tree",
            "block",
            1.0,
            r"'block' needs .* is a deterministic tree of 4 nodes\. .* deterministic, .*typical",
        ),
        ("deterministic tree", "without_replacement", 1.0, r"needs siblings drawn without replacement"),
        ("drawn chain", "block", 0.0, r"'block' is for sampling, .*; got 0\.0\. Fix: .*: greedy\."),
        ("drawn chain", "greedy", 0.7, r"'greedy' is for greedy decoding, .*; got 0\.7\. Fix: .*: block, "),
        ("nothing", "nonsense", 1.0, r"'nonsense' is unknown\. Choose one of: greedy, block, .*typical \(lossy\)"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(kind: str, wanted: str, temperature: float, message: str) -> None:
    _, tree = next(outcomes(lambda rng: DRAFTS[kind](some_drafts(0), rng)))
    state = LogitRules(SamplingOptions(temperature=temperature)).start(CONTEXT)
    with pytest.raises(OptionError, match=message):
        accept(tree, Target(np.random.default_rng(0), VOCABULARY).rows(tree), state, NumpyRng(0), wanted=wanted)


def test_lossy_rules_need_the_user_s_word() -> None:
    for rule in RULES.values():
        check_rule(rule.name, lossy=True)
        if rule.lossless:
            check_rule(rule.name, lossy=False)
        else:
            with pytest.raises(OptionError, match=rf"{rule.name!r} is lossy.*--lossy"):
                check_rule(rule.name, lossy=False)
    with pytest.raises(OptionError, match=r"'nonsense' is unknown.*greedy, block"):
        check_rule("nonsense", lossy=True)


def test_typical_acceptance_is_medusa_s() -> None:
    """Its threshold on known distributions, the longest path, and of equally long ones the more probable."""
    flat, peaked = np.full(50, 0.02), np.array([0.91, *[0.09 / 49] * 49])
    entropy = -(peaked * np.log(peaked)).sum()
    assert 0.3 * np.exp(-np.log(50)) < 0.02 and min(0.09, 0.3 * np.exp(-entropy)) > 0.09 / 49
    #  root -> 3 (flat: passes) -> 1 (peaked: fails);  root -> 5 -> 0 (passes) and 5 -> 7 (fails)
    tree = DraftTree(np.array([3, 1, 5, 0, 7]), np.array([ROOT, 0, ROOT, 2, 2]), np.zeros(5, np.float32))
    logits = np.log(np.stack([flat, peaked, peaked, peaked, flat, flat])).astype(np.float32)
    state = SAMPLED.start(CONTEXT)
    accepted = [accept(tree, HostScores(logits), state, NumpyRng(i), wanted="typical") for i in range(50)]
    assert {tuple(one.nodes) for one in accepted} == {(2, 3)}
    assert {tuple(one.token_ids[:2]) for one in accepted} == {(5, 0)} and len({one.token_ids[2] for one in accepted}) > 20
    siblings = DraftTree(np.array([3, 5, 7]), np.full(3, ROOT), np.zeros(3, np.float32))
    better = np.where(np.arange(50) == 5, 0.03, 0.97 / 49)
    rows = np.log(np.stack([better, flat, flat, flat])).astype(np.float32)
    assert accept(siblings, HostScores(rows), state, NumpyRng(0), wanted="typical").nodes == [1]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", TEXT_RULES)
@pytest.mark.parametrize("pruned", [False, True])
def test_greedy_is_the_target_s_own_path(pruned: bool, name: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    target, whole = Target(generator, 6), random_tree(generator, 6, 20)
    rules = LogitRules(SamplingOptions(no_repeat_ngram=2), TEXT_RULES[name])
    state = rules.start(CONTEXT)
    tree = prune(whole, state) if pruned else whole
    accepted = accept(tree, target.rows(tree), state, NumpyRng(0))
    text: list[int] = []
    for token in accepted.token_ids:
        assert token == rules.start([*CONTEXT, *text]).process(target.logits(tuple(text))).argmax()
        text.append(token)
    assert [int(tree.token_ids[node]) for node in accepted.nodes] == text[:-1]
    assert text == accept(whole, target.rows(whole), state, NumpyRng(0)).token_ids, "pruning takes nothing that is accepted"


@pytest.mark.parametrize("name", TEXT_RULES)
def test_pruning_leaves_out_what_is_forbidden_and_what_follows_it(name: str) -> None:
    generator = np.random.default_rng(0)
    rules = LogitRules(SamplingOptions(temperature=1.0), TEXT_RULES[name])
    target, tree, state = Target(generator, 6), random_tree(generator, 6, 20), rules.start(CONTEXT)
    possible: list[bool] = [True]
    paths: list[tuple[int, ...]] = [()]
    for parent, token in zip(tree.parents.tolist(), tree.token_ids.tolist(), strict=True):
        path = paths[parent + 1]
        allowed = possible[parent + 1] and not rules.start([*CONTEXT, *path]).forbids(token)
        assert allowed or not possible[parent + 1] or target.probabilities(path, rules)[token] == 0
        possible.append(allowed)
        paths.append((*path, token))
    pruned = prune(tree, state)
    kept = [path for path, allowed in zip(paths[1:], possible[1:], strict=True) if allowed]
    found: list[tuple[int, ...]] = [()]
    for parent, token in zip(pruned.parents.tolist(), pruned.token_ids.tolist(), strict=True):
        found.append((*found[parent + 1], token))
    assert found[1:] == kept and 0 < len(kept) < len(tree)


def test_a_tree_with_nothing_forbidden_is_left_as_it_is() -> None:
    tree = chain([1, 2], [0.0, 0.0])
    assert prune(tree, SAMPLED.start(CONTEXT)) is tree
    assert prune(tree, LogitRules(SamplingOptions(suppress_tokens=(0,))).start(CONTEXT)) is tree
    assert len(prune(tree, LogitRules(SamplingOptions(suppress_tokens=(1,))).start(CONTEXT))) == 0


class BestOnly:
    """Scores on a device: the best token of each row, and logits only of the rows that are asked for."""

    def __init__(self, scores: HostScores) -> None:
        self._scores, self.fetched = scores, list[int]()

    def best(self, row: int) -> int:
        return self._scores.best(row)

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        self.fetched.append(row)
        return self._scores[row]


@pytest.mark.parametrize(
    ("options", "fetched"), [({}, []), ({"no_repeat_ngram": 2}, [0, 1, 2]), ({"temperature": 0.5, "top_k": 1}, [0, 1, 2])]
)
def test_logits_are_fetched_for_rules_and_sampling_alone(options: dict[str, Any], fetched: list[int]) -> None:
    """And of the rows along the path alone: the chain is rejected at its third node."""
    logits = np.full((5, 4), -40.0, np.float32)
    logits[[0, 1, 2, 3, 4], [1, 2, 3, 1, 1]] = 40.0
    scores, tree = BestOnly(HostScores(logits)), chain([1, 2, 0, 1], [0.0] * 4)
    accepted = accept(tree, scores, LogitRules(SamplingOptions(**options)).start([0]), NumpyRng(0))
    assert accepted == Accepted([0, 1], [1, 2, 3]) and scores.fetched == fetched


@pytest.mark.parametrize("name", RULES)
def test_nothing_follows_an_end_token(name: str) -> None:
    rule = RULES[name]
    state = LogitRules(options_of(rule)).start(CONTEXT)
    logits = np.full((4, 3), -40.0, np.float32)
    logits[[0, 1, 2, 3], [1, 2, 1, 1]] = 40.0
    tokens = np.array([1, 2, 1])
    for probs in (None, np.eye(3)[tokens]):
        tree = DraftTree(tokens, np.arange(3) - 1, np.zeros(3, np.float32), probs)
        if rule.fits(tree, state):
            accepted = accept(tree, HostScores(logits), state, NumpyRng(0), frozenset({2}), name)
            assert accepted == Accepted([0, 1], [1, 2])
            assert accept(tree, HostScores(logits), state, NumpyRng(0), wanted=name) == Accepted([0, 1, 2], [1, 2, 1, 1])


@pytest.mark.parametrize("name", RULES)
def test_the_logit_state_is_left_as_it_is(name: str) -> None:
    """Whatever was accepted: only what is committed advances a text's own state."""
    generator, rule = np.random.default_rng(0), RULES[name]
    rules = LogitRules(replace(options_of(rule), no_repeat_ngram=1, repetition_penalty=1.5))
    state, target = rules.start(CONTEXT), Target(generator, 8)
    before = state.process(np.zeros(8, np.float32))
    tree = chain([2, 3, 4], [0.0] * 3)
    if not rule.fits(tree, state):
        tree = replace(tree, draft_probs=np.stack([target.probabilities(())] * 3))
    accept(tree, target.rows(tree), state, NumpyRng(0), wanted=name)
    prune(replace(tree, draft_probs=None), state)
    np.testing.assert_array_equal(state.process(np.zeros(8, np.float32)), before)


def test_rows_after_an_impossible_token_are_not_looked_at() -> None:
    """There the rules may forbid every token, which is an error only of a text that gets there."""
    rules = LogitRules(SamplingOptions(temperature=1.0), [SuppressedTokens((1,), 2), SuppressedTokens((0, 1, 2), 3)])
    tree = replace(chain([1, 1], [0.0, 0.0]), draft_probs=np.full((2, 3), 1 / 3))
    for wanted in (None, "without_replacement", "deterministic", "typical"):
        accepted = accept(tree, HostScores(np.zeros((3, 3), np.float32)), rules.start(CONTEXT), NumpyRng(0), wanted=wanted)
        assert accepted.nodes == [] and accepted.token_ids[0] != 1


@pytest.mark.parametrize("name", RULES)
def test_an_empty_tree_is_plain_decoding(name: str) -> None:
    scores = HostScores(np.array([[0.0, 60.0, 1.0]], np.float32))
    state = LogitRules(options_of(RULES[name])).start(CONTEXT)
    assert accept(empty_tree(), scores, state, NumpyRng(), wanted=name) == Accepted([], [1])


def test_numpy_rng_follows_its_distribution() -> None:
    rng, p = NumpyRng(0), np.array([0.2, 0.0, 0.5, 0.3])
    counts = np.bincount([rng.choose(p) for _ in range(20000)], minlength=4) / 20000
    assert np.abs(counts - p).max() < 0.02 and counts[1] == 0
    assert abs(np.mean([rng.accept(0.3) for _ in range(20000)]) - 0.3) < 0.02


def test_numpy_rng_takes_a_seed_sequence() -> None:
    first, second = np.random.SeedSequence(5).spawn(2)
    p = np.full(1000, 0.001)

    def draws(seed: np.random.SeedSequence | int | None) -> list[int]:
        rng = NumpyRng(seed)
        return [rng.choose(p) for _ in range(10)]

    assert draws(first) == draws(first) != draws(second)
    assert draws(7) == draws(7) and draws(None) != draws(None)


def test_all_paths_of_the_law_are_counted() -> None:
    target = Target(np.random.default_rng(0), 3)
    law = target.law(SAMPLED, 2)
    assert set(law) == set(product(range(3), repeat=2)) and abs(sum(law.values()) - 1) < 1e-12

"""Losslessness proved, not sampled: every outcome of the production code is enumerated with its probability.

A tiny vocabulary, a random target, random drafts. The law of the first tokens that come out (the target going on by
itself where a round ends early) must be the target's own.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from headstart.runtime.acceptance import Accepted, RandomChance, accept, accept_block, accept_without_replacement
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

Law = dict[tuple[int, ...], float]
CONTEXT = [0, 1]
SAMPLED = LogitRules(SamplingOptions(temperature=1.0))


class Replay:
    """Chance that follows a script of decisions, then takes the first possible one and notes the others."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.probability = script, 1.0
        self.taken: list[int] = []
        self.others: list[list[int]] = []

    def accept(self, probability: float) -> bool:
        return self._decide([1 - probability, probability]) == 1

    def choose(self, probabilities: NDArray[np.float64]) -> int:
        return self._decide((probabilities / probabilities.sum()).tolist())

    def _decide(self, probabilities: list[float]) -> int:
        possible = [i for i, p in enumerate(probabilities) if p > 0]
        position = len(self.taken)
        if position < len(self.script):
            option = self.script[position]
        else:
            option = possible[0]
            self.others += [[*self.taken, other] for other in possible[1:]]
        self.taken.append(option)
        self.probability *= probabilities[option]
        return option


def outcomes(experiment: Callable[[Replay], Any]) -> Iterator[tuple[float, Any]]:
    """Every result of the experiment with its probability."""
    scripts: list[list[int]] = [[]]
    while scripts:
        chance = Replay(scripts.pop())
        result = experiment(chance)
        scripts += chance.others
        yield chance.probability, result


class Target:
    """p(token | path) as a table over short paths, turned into logits."""

    def __init__(self, generator: np.random.Generator, vocabulary: int) -> None:
        self.vocabulary, self.generator = vocabulary, generator
        self.table: dict[tuple[int, ...], NDArray[np.float64]] = {}

    def logits(self, path: tuple[int, ...]) -> NDArray[np.float32]:
        if path not in self.table:
            self.table[path] = np.log(self.generator.dirichlet(np.full(self.vocabulary, 0.7)) + 1e-6)
        return self.table[path].astype(np.float32)

    def rows(self, tree: DraftTree) -> HostScores:
        paths: list[tuple[int, ...]] = [()]
        for node, parent in enumerate(tree.parents.tolist()):
            paths.append((*paths[parent + 1], int(tree.token_ids[node])))
        return HostScores(np.stack([self.logits(path) for path in paths]))

    def law(self, rules: LogitRules, length: int, prefix: tuple[int, ...] = ()) -> Law:
        """The exact law of the next `length` tokens."""
        law: Law = {(): 1.0}
        for _ in range(length):
            longer: Law = defaultdict(float)
            for path, weight in law.items():
                whole = prefix + path
                for token, p in enumerate(rules.probabilities(self.logits(whole), [*CONTEXT, *whole])):
                    longer[(*path, token)] += weight * float(p)
            law = longer
        return law


def law_of(experiment: Callable[[Replay], Accepted], target: Target, rules: LogitRules, length: int) -> tuple[Law, float]:
    """The law of the first `length` tokens of a round, the target going on where it is shorter; and the mean length."""
    law: Law = defaultdict(float)
    mean = 0.0
    for probability, accepted in outcomes(experiment):
        tokens = tuple(accepted.token_ids)
        mean += probability * len(tokens)
        for rest, weight in target.law(rules, max(0, length - len(tokens)), tokens).items():
            law[(*tokens, *rest)[:length]] += probability * weight
    return law, mean


def distance(a: Law, b: Law) -> float:
    """Total variation."""
    return sum(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in {*a, *b}) / 2


def random_tree(generator: np.random.Generator, vocabulary: int, nodes: int) -> DraftTree:
    """Siblings carry different tokens, as drafters' trees do."""
    tokens, parents = [], []
    while len(tokens) < nodes:
        parent, token = int(generator.integers(ROOT, len(tokens))), int(generator.integers(vocabulary))
        if (parent, token) not in zip(parents, tokens, strict=True):
            parents.append(parent)
            tokens.append(token)
    return DraftTree(np.array(tokens), np.array(parents), np.zeros(nodes, np.float32))


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
    target = Target(generator, 4)
    tree = random_tree(generator, 4, 5)
    law, _ = law_of(lambda chance: accept(tree, target.rows(tree), rules, CONTEXT, chance), target, rules, 3)
    assert distance(law, target.law(rules, 3)) < 1e-9


# Rules of a text, on a vocabulary of six: in the last set 0 and 1 are text, 2 ends, 3 is <|notimestamps|>, 4 and 5 are times.
TEXT_RULES: dict[str, list[LogitRule]] = {
    "forced": [ForcedTokens(3, (2,)), ForcedTokens(4, (0, 1))],
    "suppressed": [SuppressedTokens((1, 4)), SuppressedTokens((0, 5), position=2)],
    "lengths": [MinLength(4, (2, 3)), ForcedTokens(5, (2,)), NoRepeatNGram(2)],
    "timestamps": [SuppressedTokens((1,), position=3), WhisperTimestamps(3, 2, 2, 0)],
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", TEXT_RULES)
@pytest.mark.parametrize("kind", ["tree", "chain", "siblings"])
def test_drafts_that_know_no_rules_are_lossless(kind: str, name: str, seed: int) -> None:
    """Whatever is drafted against the rules of a text is rejected; the law is that of the target under them."""
    generator = np.random.default_rng(seed)
    rules = LogitRules(SamplingOptions(temperature=1.0), TEXT_RULES[name])
    target, drafts = Target(generator, 6), Target(generator, 6)
    noise = random_tree(generator, 6, 7)

    def experiment(chance: Replay) -> Accepted:
        if kind == "tree":
            tree = noise
        else:
            tree = drawn_chain(chance, drafts, SAMPLED, 2) if kind == "chain" else drawn_tree(chance, drafts, (2, 1))
        return accept(tree, target.rows(tree), rules, CONTEXT, chance)

    law, _ = law_of(experiment, target, rules, 3)
    assert distance(law, target.law(rules, 3)) < 1e-9
    unruled = target.law(SAMPLED, 3)
    assert distance(law, unruled) > 0.05, "the rules forbade something"


def drawn_chain(chance: Replay, drafts: Target, rules: LogitRules, length: int) -> DraftTree:
    tokens: list[int] = []
    rows = []
    for _ in range(length):
        rows.append(rules.probabilities(drafts.logits(tuple(tokens)), [*CONTEXT, *tokens]))
        tokens.append(chance.choose(rows[-1]))
    return DraftTree(np.array(tokens), np.arange(length) - 1, np.zeros(length, np.float32), np.stack(rows))


CHAIN_RULES = {"block": accept_block, "token by token": accept_without_replacement, "the default": accept}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", CHAIN_RULES)
@pytest.mark.parametrize("warp", ["plain", "top_k", "penalty"])
def test_drawn_chains_are_lossless(rule: str, warp: str, seed: int) -> None:
    generator, rules = np.random.default_rng(seed), LogitRules(WARPS[warp])
    target, drafts = Target(generator, 3), Target(generator, 3)

    def experiment(chance: Replay) -> Accepted:
        tree = drawn_chain(chance, drafts, rules, 3)
        return CHAIN_RULES[rule](tree, target.rows(tree), rules, CONTEXT, chance)

    law, _ = law_of(experiment, target, rules, 4)
    assert distance(law, target.law(rules, 4)) < 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_block_verification_is_never_shorter(seed: int) -> None:
    generator = np.random.default_rng(seed)
    target, drafts = Target(generator, 3), Target(generator, 3)

    def mean(rule: Callable[..., Accepted]) -> float:
        def experiment(chance: Replay) -> Accepted:
            tree = drawn_chain(chance, drafts, SAMPLED, 3)
            return rule(tree, target.rows(tree), SAMPLED, CONTEXT, chance)

        return law_of(experiment, target, SAMPLED, 1)[1]

    assert mean(accept_block) >= mean(accept_without_replacement) - 1e-12


def drawn_tree(chance: Replay, drafts: Target, widths: tuple[int, ...]) -> DraftTree:
    """Children of each node drawn without replacement, `widths` per depth."""
    tokens: list[int] = []
    parents: list[int] = []
    rows = []
    level: list[tuple[int, tuple[int, ...]]] = [(ROOT, ())]
    for width in widths:
        deeper = []
        for parent, path in level:
            q = SAMPLED.probabilities(drafts.logits(path), [])
            left = q.copy()
            for _ in range(width):
                token = chance.choose(left)
                left[token] = 0.0
                deeper.append((len(tokens), (*path, token)))
                tokens.append(token)
                parents.append(parent)
                rows.append(q)
        level = deeper
    return DraftTree(np.array(tokens), np.array(parents), np.zeros(len(tokens), np.float32), np.stack(rows))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("widths", [(2,), (3,), (2, 1), (1, 2)])
def test_trees_drawn_without_replacement_are_lossless(widths: tuple[int, ...], seed: int) -> None:
    generator = np.random.default_rng(seed)
    target, drafts = Target(generator, 4), Target(generator, 4)

    def experiment(chance: Replay) -> Accepted:
        tree = drawn_tree(chance, drafts, widths)
        return accept_without_replacement(tree, target.rows(tree), SAMPLED, CONTEXT, chance)

    law, _ = law_of(experiment, target, SAMPLED, 3)
    assert distance(law, target.law(SAMPLED, 3)) < 1e-9


def test_the_enumeration_can_fail() -> None:
    """Always accepting what was drafted is not lossless, and the distance says so."""
    generator = np.random.default_rng(0)
    target, drafts = Target(generator, 3), Target(generator, 3)

    def gullible(chance: Replay) -> Accepted:
        tree = drawn_chain(chance, drafts, SAMPLED, 2)
        return Accepted([0, 1], [*tree.token_ids.tolist(), chance.choose(SAMPLED.probabilities(target.rows(tree)[2], []))])

    law, _ = law_of(gullible, target, SAMPLED, 3)
    assert distance(law, target.law(SAMPLED, 3)) > 0.05


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", TEXT_RULES)
def test_greedy_is_the_target_s_own_path(name: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    target, tree = Target(generator, 6), random_tree(generator, 6, 20)
    rules = LogitRules(SamplingOptions(no_repeat_ngram=2), TEXT_RULES[name])
    accepted = accept(tree, target.rows(tree), rules, CONTEXT, RandomChance(0))
    text: list[int] = []
    for token in accepted.token_ids:
        assert token == rules.process(target.logits(tuple(text)), [*CONTEXT, *text]).argmax()
        text.append(token)
    assert [int(tree.token_ids[node]) for node in accepted.nodes] == text[:-1]


class BestOnly:
    """Scores on a device far away: the best token of each row, and logits only of the rows that may be asked for."""

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
    accepted = accept(tree, scores, LogitRules(SamplingOptions(**options)), [0], RandomChance(0))
    assert accepted == Accepted([0, 1], [1, 2, 3]) and scores.fetched == fetched


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drawn", [False, True])
def test_nothing_stands_behind_an_end_token(temperature: float, drawn: bool) -> None:
    rules = LogitRules(SamplingOptions(temperature=temperature))
    logits = np.full((4, 3), -40.0, np.float32)
    logits[[0, 1, 2, 3], [1, 2, 1, 1]] = 40.0
    tokens = np.array([1, 2, 1])
    probs = np.eye(3, dtype=np.float32)[tokens] if drawn else None
    tree = DraftTree(tokens, np.arange(3) - 1, np.zeros(3, np.float32), probs)
    accepted = accept(tree, HostScores(logits), rules, CONTEXT, RandomChance(0), frozenset({2}))
    assert accepted == Accepted([0, 1], [1, 2])
    assert accept(tree, HostScores(logits), rules, CONTEXT, RandomChance(0)) == Accepted([0, 1, 2], [1, 2, 1, 1])


def test_an_empty_tree_is_plain_decoding() -> None:
    scores = HostScores(np.array([[0.0, 3.0, 1.0]], np.float32))
    assert accept(empty_tree(), scores, LogitRules(SamplingOptions()), CONTEXT, RandomChance()) == Accepted([], [1])


def test_random_chance_follows_its_distribution() -> None:
    chance, p = RandomChance(0), np.array([0.2, 0.0, 0.5, 0.3])
    counts = np.bincount([chance.choose(p) for _ in range(20000)], minlength=4) / 20000
    assert np.abs(counts - p).max() < 0.02 and counts[1] == 0
    assert abs(np.mean([chance.accept(0.3) for _ in range(20000)]) - 0.3) < 0.02


def test_all_paths_of_the_law_are_counted() -> None:
    target = Target(np.random.default_rng(0), 3)
    law = target.law(SAMPLED, 2)
    assert set(law) == set(product(range(3), repeat=2)) and abs(sum(law.values()) - 1) < 1e-12

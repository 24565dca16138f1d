"""Exact enumeration: the law of what comes out of a piece of production code, over a tiny vocabulary.

The code asks a `Replay` for its random decisions; every sequence of decisions is played once, with its probability.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.acceptance import Accepted
from headstart.runtime.graph import HostScores
from headstart.runtime.sampling import LogitRules, SamplingOptions
from headstart.runtime.tree import ROOT, DraftTree, chain

T = TypeVar("T")
Law = dict[tuple[int, ...], float]
CONTEXT = [0, 1]
SAMPLED = LogitRules(SamplingOptions(temperature=1.0))


class Replay:
    """An Rng that follows a script of decisions, then takes the first possible one and records the others."""

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


def outcomes(experiment: Callable[[Replay], T]) -> Iterator[tuple[float, T]]:
    """Every result of the experiment with its probability."""
    scripts: list[list[int]] = [[]]
    while scripts:
        rng = Replay(scripts.pop())
        result = experiment(rng)
        scripts += rng.others
        yield rng.probability, result


class Target:
    """p(token | path) as a table over short paths, turned into logits."""

    def __init__(self, generator: np.random.Generator, vocabulary: int) -> None:
        self.vocabulary, self.generator = vocabulary, generator
        self.table: dict[tuple[int, ...], NDArray[np.float64]] = {}
        self._plain: dict[tuple[int, ...], NDArray[np.float64]] = {}

    def logits(self, path: tuple[int, ...]) -> NDArray[np.float32]:
        if path not in self.table:
            self.table[path] = np.log(self.generator.dirichlet(np.full(self.vocabulary, 0.7)) + 1e-6)
        return self.table[path].astype(np.float32)

    def rows(self, tree: DraftTree) -> HostScores:
        paths: list[tuple[int, ...]] = [()]
        for node, parent in enumerate(tree.parents.tolist()):
            paths.append((*paths[parent + 1], int(tree.token_ids[node])))
        return HostScores(np.stack([self.logits(path) for path in paths]))

    def probabilities(self, path: tuple[int, ...], rules: LogitRules = SAMPLED) -> NDArray[np.float64]:
        if rules is not SAMPLED:
            return rules.start([*CONTEXT, *path]).probabilities(self.logits(path))
        if path not in self._plain:
            self._plain[path] = SAMPLED.start([]).probabilities(self.logits(path))
        return self._plain[path]

    def law(self, rules: LogitRules, length: int, prefix: tuple[int, ...] = (), ends: frozenset[int] = frozenset()) -> Law:
        """The exact law of the next `length` tokens, or fewer where the text ends."""
        law: Law = {(): 1.0}
        for _ in range(length):
            longer: Law = defaultdict(float)
            for path, weight in law.items():
                whole = prefix + path
                if whole and whole[-1] in ends:
                    longer[path] += weight
                    continue
                for token, p in enumerate(self.probabilities(whole, rules)):
                    longer[(*path, token)] += weight * float(p)
            law = longer
        return law


def law_of(
    experiment: Callable[[Replay], Accepted],
    target: Target,
    rules: LogitRules,
    length: int,
    ends: frozenset[int] = frozenset(),
) -> tuple[Law, float]:
    """The law of the first `length` tokens of a round, the target continuing where it is shorter; and the mean length."""
    rounds: Law = defaultdict(float)
    for probability, accepted in outcomes(experiment):
        rounds[tuple(accepted.token_ids)] += probability
    law: Law = defaultdict(float)
    for tokens, probability in rounds.items():
        for rest, weight in target.law(rules, max(0, length - len(tokens)), tokens, ends).items():
            law[(*tokens, *rest)[:length]] += probability * weight
    return law, sum(probability * len(tokens) for tokens, probability in rounds.items())


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


def drawn_chain(rng: Replay, drafts: Target, rules: LogitRules, length: int) -> DraftTree:
    tokens: list[int] = []
    rows = []
    for _ in range(length):
        rows.append(drafts.probabilities(tuple(tokens), rules))
        tokens.append(rng.choose(rows[-1]))
    log_probs = [float(np.log(row[token])) for row, token in zip(rows, tokens, strict=True)]
    return replace(chain(tokens, log_probs), draft_probs=np.stack(rows))


def drawn_tree(rng: Replay, drafts: Target, widths: tuple[int, ...]) -> DraftTree:
    """Children of each node drawn without replacement, `widths` per depth."""
    tokens: list[int] = []
    parents: list[int] = []
    log_probs: list[float] = []
    rows = []
    level: list[tuple[int, tuple[int, ...], float]] = [(ROOT, (), 0.0)]
    for width in widths:
        deeper = []
        for parent, path, above in level:
            q = drafts.probabilities(path)
            left = q.copy()
            for _ in range(width):
                token = rng.choose(left)
                left[token] = 0.0
                deeper.append((len(tokens), (*path, token), above + float(np.log(q[token]))))
                tokens.append(token)
                parents.append(parent)
                log_probs.append(deeper[-1][2])
                rows.append(q)
        level = deeper
    return DraftTree(np.array(tokens), np.array(parents), np.array(log_probs, np.float32), np.stack(rows))

"""Acceptance: which path of a draft tree the target agrees with, and the token of its own that it adds.

Every rule here is lossless: whatever was drafted, the tokens that come out follow the target's distribution after logit
rules and warping (greedy: are the very tokens). Rows are processed only along the path that is walked.

| rule | drafts | source |
| --- | --- | --- |
| greedy | any | longest path of best tokens |
| deterministic | a function of the text | "delta-q", EAGLE-2, arXiv 2406.16858 |
| without replacement | siblings drawn without replacement | arXiv 2402.14160, 2402.12374; a chain is arXiv 2211.17192 |
| block | chains drawn from a draft model | arXiv 2403.10444 |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .graph import Scores
from .sampling import LogitRules
from .tree import DraftTree

Probabilities = NDArray[np.float64]  # [V]


class Chance(Protocol):
    """The only source of randomness, so that a test can enumerate every outcome."""

    def accept(self, probability: float) -> bool:
        """True with this probability."""
        ...

    def choose(self, probabilities: Probabilities) -> int:
        """An index drawn from a distribution."""
        ...


class RandomChance:
    """Chance by numpy's generator; equal seeds give equal decisions."""

    def __init__(self, seed: int | None = None) -> None:
        self._generator = np.random.default_rng(seed)

    def accept(self, probability: float) -> bool:
        return bool(self._generator.random() < probability)

    def choose(self, probabilities: Probabilities) -> int:
        cumulative = np.cumsum(probabilities)
        # Scaled by the sum, so that rounding cannot push the draw behind the last token.
        return int(np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right"))


@dataclass(frozen=True)
class Accepted:
    """The outcome of one verify pass.

    Attributes:
        nodes: the tree nodes on the accepted path, the root excluded.
        token_ids: their tokens and, unless the path ends with an end token, the target's own token behind them.
    """

    nodes: list[int]
    token_ids: list[int]


# Decides one token: (row of the verify pass, child nodes of that row, text so far) -> (token, the child it is or None)
Decide = Callable[[int, list[int], Sequence[int]], tuple[int, int | None]]


def accept(
    tree: DraftTree,
    scores: Scores,  # of N + 1 rows, row 0 the root's
    rules: LogitRules,
    context: Sequence[int],  # the text so far, root included
    chance: Chance,
    end_tokens: frozenset[int] = frozenset(),
) -> Accepted:
    """Apply the lossless rule that fits the options and the drafts. Nothing is accepted behind an end token."""
    if rules.options.greedy:
        return _walk(tree, context, end_tokens, _greedy(tree, scores, rules))
    if tree.draft_probs is None:
        return _walk(tree, context, end_tokens, _deterministic(tree, scores, rules, chance))
    if len(tree) and (tree.parents == np.arange(len(tree)) - 1).all():
        return accept_block(tree, scores, rules, context, chance, end_tokens)
    return accept_without_replacement(tree, scores, rules, context, chance, end_tokens)


def _walk(tree: DraftTree, context: Sequence[int], end_tokens: frozenset[int], decide: Decide) -> Accepted:
    """From the root down, one decision a row, until the decided token is no child or ends the text."""
    children = tree.children()
    nodes: list[int] = []
    text = list(context)
    row = 0
    while True:
        token, child = decide(row, children[row], text)
        text.append(token)
        if child is not None:
            nodes.append(child)
        if child is None or token in end_tokens:
            return Accepted(nodes, text[len(context) :])
        row = child + 1


def _child_with(tree: DraftTree, children: list[int], token: int) -> int | None:
    return next((child for child in children if tree.token_ids[child] == token), None)


def _greedy(tree: DraftTree, scores: Scores, rules: LogitRules) -> Decide:
    def decide(row: int, children: list[int], text: Sequence[int]) -> tuple[int, int | None]:
        token = int(rules.process(scores[row], text).argmax()) if rules else scores.best(row)
        return token, _child_with(tree, children, token)

    return decide


def _deterministic(tree: DraftTree, scores: Scores, rules: LogitRules, chance: Chance) -> Decide:
    """Draw from the target and follow the child that was drawn, if there is one.

    The same law as testing the children in turn (accept x with p(x), else zero it and renormalise): either way child
    x is followed with probability p(x), and what is drawn otherwise follows p outside the children.
    """

    def decide(row: int, children: list[int], text: Sequence[int]) -> tuple[int, int | None]:
        token = chance.choose(rules.probabilities(scores[row], text))
        return token, _child_with(tree, children, token)

    return decide


def accept_without_replacement(
    tree: DraftTree,
    scores: Scores,
    rules: LogitRules,
    context: Sequence[int],
    chance: Chance,
    end_tokens: frozenset[int] = frozenset(),
) -> Accepted:
    """Siblings in the order in which they were drawn: accept x with min(1, p/q), else p <- norm(max(p - q, 0)), q(x) <- 0."""
    assert tree.draft_probs is not None
    draft_probs = tree.draft_probs

    def decide(row: int, children: list[int], text: Sequence[int]) -> tuple[int, int | None]:
        target = rules.probabilities(scores[row], text)
        draft = draft_probs[children[0]].copy() if children else target
        for child in children:
            token = int(tree.token_ids[child])
            if chance.accept(min(1.0, target[token] / draft[token])):
                return token, child
            target = _normalised(np.maximum(target - draft, 0.0))
            draft[token] = 0.0
            draft = _normalised(draft)
        return chance.choose(target), None

    return _walk(tree, context, end_tokens, decide)


def _normalised(weights: Probabilities) -> Probabilities:
    total = weights.sum()
    return weights / total if total > 0 else weights


def accept_block(
    tree: DraftTree,
    scores: Scores,
    rules: LogitRules,
    context: Sequence[int],
    chance: Chance,
    end_tokens: frozenset[int] = frozenset(),
) -> Accepted:
    """A drawn chain tested as one block: never shorter in expectation than token by token (arXiv 2403.10444, algorithm 2).

    w_0 = 1, w_i = min(1, w_{i-1} p(x_i) / q(x_i)); block i is accepted with h_i = S_i / (S_i + 1 - w_i), where
    S_i = Σ_x max(w_i p(x) - q(x), 0) at the next position, and h_n = w_n; the longest accepted block counts. Testing
    from the longest down gives the same law with fewer draws.
    """
    assert tree.draft_probs is not None
    tokens = _up_to_end(tree.token_ids.tolist(), end_tokens)
    text = list(context)
    targets = [rules.probabilities(scores[row], text + tokens[:row]) for row in range(len(tokens) + 1)]
    drafts = tree.draft_probs
    weights = [1.0]
    for i, token in enumerate(tokens):
        weights.append(min(1.0, weights[-1] * targets[i][token] / drafts[i][token]))
    accepted, residual = len(tokens), targets[-1]
    if not chance.accept(weights[-1]):
        accepted -= 1
        residual = np.maximum(weights[accepted] * targets[accepted] - drafts[accepted], 0.0)
        while accepted > 0 and not chance.accept(_block_probability(residual.sum(), weights[accepted])):
            accepted -= 1
            residual = np.maximum(weights[accepted] * targets[accepted] - drafts[accepted], 0.0)
    kept = tokens[:accepted]
    if not kept or kept[-1] not in end_tokens:
        kept = [*kept, chance.choose(_normalised(residual))]
    return Accepted(list(range(accepted)), kept)


def _block_probability(surplus: float, weight: float) -> float:
    below = surplus + 1.0 - weight
    return surplus / below if below > 0 else 0.0  # 0/0: the next token is accepted with certainty, so never asked


def _up_to_end(tokens: list[int], end_tokens: frozenset[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in end_tokens), len(tokens) - 1)
    return tokens[: end + 1]

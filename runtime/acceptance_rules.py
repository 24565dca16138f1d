"""The acceptance rules: how a draft tree is tested against the target's scores. `acceptance` has the table of them.

All have one signature: (tree, scores of its N + 1 rows, logit state at the root, rng, end tokens) → Accepted. None changes
the logit state, none accepts anything after an end token. Logits are processed only along the paths that are walked.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .graph import Scores
from .rng import Rng
from .sampling import LogitState
from .tree import DraftTree

Probabilities = NDArray[np.float64]  # [V]

TYPICAL_THRESHOLD = 0.09  # ε of Medusa's typical acceptance, and its δ = sqrt(ε): the values its authors release
TYPICAL_ENTROPY_FACTOR = 0.3


@dataclass(frozen=True)
class Accepted:
    """The outcome of one verify pass.

    Attributes:
        nodes: the tree nodes on the accepted path, the root excluded.
        token_ids: their tokens and, unless the path ends with an end token, the target's own token after them.
    """

    nodes: list[int]
    token_ids: list[int]


# Decides one token: (row of the verify pass, its child nodes, logit state there) -> (token, the child it is or None)
Decide = Callable[[int, list[int], LogitState], tuple[int, int | None]]


def _walk(tree: DraftTree, logits: LogitState, end_tokens: frozenset[int], decide: Decide) -> Accepted:
    """From the root down, one decision per row, until the decided token is no child or ends the text."""
    children = tree.children()
    accepted = Accepted([], [])
    state = logits.fork()
    row = 0
    while True:
        token, child = decide(row, children[row], state)
        accepted.token_ids.append(token)
        if child is not None:
            accepted.nodes.append(child)
        if child is None or token in end_tokens:
            return accepted
        state.advance(token)
        row = child + 1


def _child_with(tree: DraftTree, children: list[int], token: int) -> int | None:
    return next((child for child in children if tree.token_ids[child] == token), None)


def accept_greedy(tree: DraftTree, scores: Scores, logits: LogitState, rng: Rng, end_tokens: frozenset[int]) -> Accepted:
    """The longest path of the target's best tokens."""

    def decide(row: int, children: list[int], state: LogitState) -> tuple[int, int | None]:
        token = int(state.process(scores[row]).argmax()) if state else scores.best(row)
        return token, _child_with(tree, children, token)

    return _walk(tree, logits, end_tokens, decide)


def accept_sampled(tree: DraftTree, scores: Scores, logits: LogitState, rng: Rng, end_tokens: frozenset[int]) -> Accepted:
    """Draw from the target, and follow the child that was drawn if there is one.

    The draw never looks at the drafts, so this holds for any of them. For deterministic ones no rule accepts more, and the
    distribution is that of testing the children in turn (accept x with p(x), else p(x) <- 0 and renormalise): either way
    child x is followed with probability p(x), and what is drawn otherwise follows p outside the children.
    """

    def decide(row: int, children: list[int], state: LogitState) -> tuple[int, int | None]:
        token = rng.choose(state.probabilities(scores[row]))
        return token, _child_with(tree, children, token)

    return _walk(tree, logits, end_tokens, decide)


def accept_without_replacement(
    tree: DraftTree, scores: Scores, logits: LogitState, rng: Rng, end_tokens: frozenset[int]
) -> Accepted:
    """Siblings in the order in which they were drawn: accept x with min(1, p/q), else p <- norm(max(p - q, 0)), q(x) <- 0."""
    draft_probs = tree.draft_probs

    def decide(row: int, children: list[int], state: LogitState) -> tuple[int, int | None]:
        target = state.probabilities(scores[row])
        if draft_probs is None or not children:
            return rng.choose(target), None
        draft = draft_probs[children[0]].copy()
        for child in children:
            token = int(tree.token_ids[child])
            if rng.accept(min(1.0, target[token] / draft[token])):
                return token, child
            target = _normalised(np.maximum(target - draft, 0.0))
            draft[token] = 0.0
            draft = _normalised(draft)
        return rng.choose(target), None

    return _walk(tree, logits, end_tokens, decide)


def _normalised(weights: Probabilities) -> Probabilities:
    total = weights.sum()
    return weights / total if total > 0 else weights


def accept_block(tree: DraftTree, scores: Scores, logits: LogitState, rng: Rng, end_tokens: frozenset[int]) -> Accepted:
    """A drawn chain tested as one block: never shorter in expectation than token by token (arXiv 2403.10444, algorithm 2).

    w_0 = 1, w_i = min(1, w_{i-1} p(x_i) / q(x_i)); block i is accepted with h_i = S_i / (S_i + 1 - w_i), where
    S_i = Σ_x max(w_i p(x) - q(x), 0) at the next position, and h_n = w_n; the longest accepted block counts. Testing
    from the longest down gives the same distribution with fewer draws.
    """
    tokens = _up_to_end(tree.token_ids.tolist(), end_tokens)
    targets, weights = _block_weights(tokens, tree.draft_probs, scores, logits)
    accepted, residual = len(weights) - 1, targets[-1]
    if not rng.accept(weights[-1]):
        accepted, residual = _longest_shorter_block(targets, weights, tree.draft_probs, rng)
    kept = tokens[:accepted]
    if not kept or kept[-1] not in end_tokens:
        kept = [*kept, rng.choose(_normalised(residual))]
    return Accepted(list(range(accepted)), kept)


def _block_weights(
    tokens: list[int], drafts: Probabilities | None, scores: Scores, logits: LogitState
) -> tuple[list[Probabilities], list[float]]:
    """The target's distributions along a chain, and w_0, w_1, …, up to the first of 0: no longer block can be accepted."""
    state = logits.fork()
    targets, weights = [state.probabilities(scores[0])], [1.0]
    for i, token in enumerate(tokens):
        assert drafts is not None
        weights.append(min(1.0, weights[-1] * targets[i][token] / drafts[i][token]))
        if weights[-1] == 0:
            break
        state.advance(token)
        targets.append(state.probabilities(scores[i + 1]))
    return targets, weights


def _longest_shorter_block(
    targets: list[Probabilities], weights: list[float], drafts: Probabilities | None, rng: Rng
) -> tuple[int, Probabilities]:
    """The length of the longest accepted block short of the whole, and what is left of the target's distribution there."""
    assert drafts is not None
    length = len(weights) - 2
    residual = np.maximum(weights[length] * targets[length] - drafts[length], 0.0)
    while length > 0 and not rng.accept(_block_probability(residual.sum(), weights[length])):
        length -= 1
        residual = np.maximum(weights[length] * targets[length] - drafts[length], 0.0)
    return length, residual


def _block_probability(surplus: float, weight: float) -> float:
    below = surplus + 1.0 - weight
    return surplus / below if below > 0 else 0.0  # 0/0: the next token is accepted with certainty, so never asked


def _up_to_end(tokens: list[int], end_tokens: frozenset[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in end_tokens), len(tokens) - 1)
    return tokens[: end + 1]


def accept_typical(tree: DraftTree, scores: Scores, logits: LogitState, rng: Rng, end_tokens: frozenset[int]) -> Accepted:
    """The longest path of tokens with p(x) > min(ε, δ exp(-H(p))), then a draw from the target (arXiv 2401.10774, 2.3.1).

    Of paths of equal length the most probable is taken. Lossy: drafted tokens are accepted although a draw could have
    chosen another.
    """
    children = tree.children()
    candidates = [_Candidate((), 0.0, 0, logits)]
    best, best_target = candidates[0], None
    while candidates:
        candidate = candidates.pop()
        target = candidate.state.probabilities(scores[candidate.row])
        if best_target is None or candidate.rank > best.rank:
            best, best_target = candidate, target
        if candidate.row and tree.token_ids[candidate.row - 1] in end_tokens:
            continue
        least = _typical_probability(target)
        likely = [child for child in children[candidate.row] if target[tree.token_ids[child]] > least]
        candidates += [candidate.extended(tree, child, target) for child in likely]
    assert best_target is not None
    tokens = tree.token_ids[list(best.nodes)].tolist()
    if not tokens or tokens[-1] not in end_tokens:
        tokens.append(rng.choose(best_target))
    return Accepted(list(best.nodes), tokens)


@dataclass(frozen=True)
class _Candidate:
    """A path of nodes that all pass, its log-likelihood, its last row and the logit state there."""

    nodes: tuple[int, ...]
    likelihood: float
    row: int
    state: LogitState

    @property
    def rank(self) -> tuple[int, float]:
        return len(self.nodes), self.likelihood

    def extended(self, tree: DraftTree, child: int, target: Probabilities) -> "_Candidate":
        token = int(tree.token_ids[child])
        state = self.state.fork()
        state.advance(token)
        return _Candidate((*self.nodes, child), self.likelihood + float(np.log(target[token])), child + 1, state)


def _typical_probability(target: Probabilities) -> float:
    """min(ε, δ exp(-H)): what a token must exceed; in a flat distribution less is expected of it."""
    possible = target[target > 0]
    entropy = -float((possible * np.log(possible)).sum())
    return min(TYPICAL_THRESHOLD, TYPICAL_ENTROPY_FACTOR * float(np.exp(-entropy)))

"""How much of a draft is worth verifying: the part of the tree that brings the most tokens per second.

A verify pass over n rows for each of B sequences costs t(B, n); the tokens it brings are 1 + Σ path probability for each of
them. Nodes are taken in falling probability, so the best part of a tree is a prefix of that order (OPT-Tree, arXiv 2406.17276;
Sequoia, arXiv 2402.12374). Probabilities were measured on other texts, and greedily, so promised tokens are compared with
accepted ones and scaled. Where the accepted tokens do not pay for the drafting, the drafter rests; while it rests, an
inexpensive one is followed in the *shadow*: it proposes, nothing is verified, and the target's own tokens tell what would
have been accepted. An untuned drafter starts in the shadow, so that it costs nothing until it has shown that it pays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .graph import MAX_ROWS
from .tree import ROOT, DraftTree, empty_tree
from .verify_cost import Curve

WINDOW = 16  # drafted rounds after which the account is settled
SHORTEST_REST, LONGEST_REST = 32, 1024  # plain rounds before the drafter is tried again
GAIN = 1.1  # what a draft must promise over plain decoding: each size of pass has costs of its own that t(n) does not hold
FORGET = 0.95  # weight of earlier rounds in a drafter's record: some 20 rounds count
BENEFIT_OF_DOUBT = 4.0  # promised tokens that count as accepted before anything was seen
SHADOW_PROOF = 8.0  # promised tokens to follow in the shadow before an untuned drafter may draft
SHADOW_PRICE = 0.01  # the most that proposing in the shadow may cost, of a plain round


@dataclass
class Account:
    """What drafting brought and cost since it was last settled, in plain decoding's own milliseconds."""

    rounds: int = 0
    milliseconds: float = 0.0
    plain_milliseconds: float = 0.0


@dataclass
class Record:
    """How well a drafter's probabilities hold: tokens promised and tokens accepted, earlier rounds fading."""

    promised: float = 0.0
    accepted: float = 0.0

    @property
    def trust(self) -> float:
        """By what to multiply a promise."""
        return (BENEFIT_OF_DOUBT + self.accepted) / (BENEFIT_OF_DOUBT + self.promised)

    def add(self, promised: float, accepted: float) -> None:
        self.promised = FORGET * self.promised + promised
        self.accepted = FORGET * self.accepted + accepted


@dataclass
class DrafterStats:
    """What is known of one drafter in use, shared by all sequences that it drafts for.

    `proven` False keeps the drafter in the shadow until it has promised SHADOW_PROOF tokens there.
    """

    proven: bool = True
    record: Record = field(default_factory=Record)
    _account: Account = field(default_factory=Account)
    _rest: int = 0  # plain rounds still to go
    _next_rest: int = SHORTEST_REST
    _shadowed: float = 0.0  # tokens promised in the shadow

    @property
    def resting(self) -> bool:
        return self._rest > 0 or not self.proven

    def rested(self) -> None:
        """A plain round has passed."""
        self._rest = max(0, self._rest - 1)

    def shadowed(self, promised: float, accepted: float) -> None:
        """A tree was followed without being verified."""
        self.record.add(promised, accepted)
        self._shadowed += promised
        self.proven = self.proven or self._shadowed >= SHADOW_PROOF

    def add(self, milliseconds: float, plain_milliseconds: float) -> None:
        """One drafted round: what it took, and what the same tokens would have taken plainly."""
        account = self._account
        account.rounds += 1
        account.milliseconds += milliseconds
        account.plain_milliseconds += plain_milliseconds
        if account.rounds >= WINDOW:
            self._settle()

    def _settle(self) -> None:
        """Rest when plain decoding would have been about as fast, twice as long each time in a row."""
        if self._account.plain_milliseconds < GAIN * self._account.milliseconds:
            self._rest = self._next_rest
            self._next_rest = min(2 * self._next_rest, LONGEST_REST)
        else:
            self._next_rest = SHORTEST_REST
        self._account = Account()


class Shadow:
    """A tree that was proposed and not verified, followed along the tokens that the target decides by itself."""

    def __init__(self, tree: DraftTree, known: int) -> None:
        """`known`: tokens of the text when the tree was proposed."""
        self._tree, self._known = tree, known
        self._children = tree.children()
        self._node = ROOT
        self.accepted = 0
        self.promised = float(np.exp(tree.log_probs.astype(np.float64)).sum())

    def follow(self, token_ids: Sequence[int]) -> bool:
        """Take the text so far. Returns whether it is settled what would have been accepted."""
        while self._known < len(token_ids):
            token = token_ids[self._known]
            self._known += 1
            found = [node for node in self._children[self._node + 1] if self._tree.token_ids[node] == token]
            if not found:
                return True
            self._node, self.accepted = found[0], self.accepted + 1
        return not self._children[self._node + 1]


@dataclass
class Budget:
    """One sequence's budget for one drafter.

    Attributes:
        price: milliseconds of a proposal by (nodes, depth), whether or not its tree is used.
        max_nodes: to ask the drafter for.
        stats: of the drafter, shared by the sequences it serves.
    """

    price: Callable[[int, int], float]
    max_nodes: int
    stats: DrafterStats = field(default_factory=DrafterStats)
    _promise: float = 0.0  # Σ probability of the tree that was verified last
    _shadow: Shadow | None = None
    _pause: int = 0  # plain rounds until the next shadow, so that shadows cost next to nothing

    @property
    def resting(self) -> bool:
        return self.stats.resting

    def draft_ms(self) -> float:
        return self.price(self.max_nodes, self.max_nodes)

    def wants_shadow(self, token_ids: Sequence[int]) -> bool:
        """Whether to propose in this round although nothing will be verified. Settles the shadow before."""
        if self._shadow is not None and self._shadow.follow(token_ids):
            self.stats.shadowed(self._shadow.promised, self._shadow.accepted)
            self._shadow = None
        self._pause = max(0, self._pause - 1)
        return self._shadow is None and self._pause == 0

    def shadow(self, tree: DraftTree, token_ids: Sequence[int], plain_ms: float) -> None:
        """Follow this tree instead of verifying it. A drawn one tells nothing about what greedy text would accept."""
        self._pause = int(self.draft_ms() / max(SHADOW_PRICE * plain_ms, 1e-9))
        if len(tree) and tree.draft_probs is None:
            self._shadow = Shadow(tree, len(token_ids))
        elif len(tree):
            self.stats.proven = True

    def drafted(self, promise: float) -> None:
        """The tree that is verified in this round promises so many tokens besides the target's own."""
        self._promise = promise

    def observe(self, tokens: int, milliseconds: float, plain_milliseconds: float, drafted: bool) -> None:
        """One round brought `tokens`.

        `milliseconds`: of a verify pass of the tree's size; `plain_milliseconds`: of a plain one. `drafted`: a draft was
        asked for.
        """
        if not drafted:
            self.stats.rested()
            return
        self.stats.record.add(self._promise, tokens - 1 if self._promise else 0)
        self.stats.add(milliseconds + self.draft_ms(), tokens * plain_milliseconds)
        self._promise = 0.0


@dataclass(frozen=True)
class Draft:
    """A tree proposed for one sequence, and the budget that limits it; None verifies all of it."""

    tree: DraftTree
    budget: Budget | None = None

    @property
    def fixed(self) -> bool:
        """Verified as it is. A drawn draft is: leaving nodes out by what was drawn would bias the output's distribution."""
        return self.budget is None or self.tree.draft_probs is not None

    def promises(self, most: int) -> NDArray[np.float64]:
        """[≤ most + 1] tokens that its best 0, 1, … nodes promise, scaled by how well promises held so far."""
        assert self.budget is not None
        probabilities = np.sort(np.exp(self.tree.log_probs.astype(np.float64)))[::-1][:most]
        return self.budget.stats.record.trust * np.concatenate([[0.0], np.cumsum(probabilities)])


def share(drafts: Sequence[Draft], curve: Curve) -> list[DraftTree]:
    """What of each tree to verify in one pass: the rows that bring the most tokens of all sequences per millisecond.

    A pass has equally many rows for each sequence, so all of them share one number of rows; a sequence whose best nodes are
    fewer or promise nothing leaves the rest of its rows unused. `curve` is t(B, n) of the batch at hand.
    """
    least = max((len(draft.tree) for draft in drafts if draft.fixed), default=0)
    limited = [draft for draft in drafts if not draft.fixed and len(draft.tree)]
    if not limited:
        return [draft.tree for draft in drafts]
    nodes = _best_size(limited, least, len(drafts), curve)
    return [draft.tree if draft.fixed else _cut(draft, nodes) for draft in drafts]


def _best_size(limited: Sequence[Draft], least: int, sequences: int, curve: Curve) -> int:
    """Nodes per sequence with the most tokens per millisecond; those that fixed trees take unless more are clearly better."""
    most = max(least, min(MAX_ROWS - 1, max(len(draft.tree) for draft in limited)))
    tokens = np.full(most + 1, float(sequences))
    for draft in limited:
        promises = draft.promises(most)
        tokens += np.pad(promises, (0, most + 1 - len(promises)), mode="edge")
    draft_ms = max(draft.budget.draft_ms() for draft in limited if draft.budget is not None)
    rates = tokens / (curve[1 : most + 2] + draft_ms)
    best = least + int(rates[least:].argmax())
    return best if best == least or rates[best] >= GAIN * rates[least] else least


def _cut(draft: Draft, nodes: int) -> DraftTree:
    assert draft.budget is not None
    tree = draft.tree.best(nodes, len(draft.tree)) if nodes else empty_tree()
    draft.budget.drafted(float(np.exp(tree.log_probs.astype(np.float64)).sum()))
    return tree

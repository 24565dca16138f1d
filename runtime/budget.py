"""How much of a draft is worth verifying: the part of the tree that brings the most tokens per second.

A verify pass over n nodes costs t(n), measured; the tokens it brings are 1 + Σ path probability. Nodes are taken in falling
probability, so the best part of a tree is a prefix of that order (design, the loop; OPT-Tree, arXiv 2406.17276; Sequoia,
arXiv 2402.12374). Probabilities were measured on other texts, and greedily: what they promise is held against what comes, and
scaled. When the tokens that really come do not pay for the drafting, the drafter rests.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .engine import MAX_ROWS
from .tree import DraftTree, empty_tree

HISTORY_STEP = 64  # tokens of history over which a cost curve is reused
WINDOW = 16  # drafted rounds after which the account is settled
SHORTEST_REST, LONGEST_REST = 32, 1024  # plain rounds before the drafter is tried again
GAIN = 1.1  # what a draft must promise over plain decoding: each size of pass has costs of its own that t(n) does not hold
FORGET = 0.95  # weight of the rounds before the last in a drafter's record: some 20 rounds count
BENEFIT_OF_DOUBT = 4.0  # promised tokens that count as kept before anything was seen


@dataclass(frozen=True)
class VerifyCost:
    """Milliseconds of a verify pass: `milliseconds[i][j]` over `rows[j]` rows behind `histories[i]` tokens."""

    rows: tuple[int, ...]
    histories: tuple[int, ...]
    milliseconds: tuple[tuple[float, ...], ...]

    def curve(self, history: int) -> NDArray[np.float64]:
        """[MAX_ROWS + 1]: the cost of that many rows, between the measured histories and rows by straight lines."""
        columns = np.array(self.milliseconds)  # [histories, rows]
        at_history = [np.interp(history, self.histories, column) for column in columns.T]
        curve: NDArray[np.float64] = np.interp(np.arange(MAX_ROWS + 1), self.rows, at_history)
        return curve


@dataclass
class Account:
    """What drafting brought and cost since it was last settled, in plain decoding's own milliseconds."""

    rounds: int = 0
    tokens: int = 0
    milliseconds: float = 0.0
    plain_milliseconds: float = 0.0


@dataclass
class Record:
    """How well a drafter's probabilities hold: tokens promised and tokens accepted, old rounds fading."""

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
class Standing:
    """What is known of one drafter in use. Texts that come one after another, or side by side, may share it."""

    record: Record = field(default_factory=Record)
    _account: Account = field(default_factory=Account)
    _rest: int = 0  # plain rounds still to go
    _next_rest: int = SHORTEST_REST

    @property
    def resting(self) -> bool:
        return self._rest > 0

    def rested(self) -> None:
        """A plain round has passed."""
        self._rest = max(0, self._rest - 1)

    def book(self, tokens: int, milliseconds: float, plain_milliseconds: float) -> None:
        """One drafted round: what it brought, what it took, and what the same tokens would have taken plainly."""
        account = self._account
        account.rounds += 1
        account.tokens += tokens
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


@dataclass
class Budget:
    """One sequence's budget for one drafter.

    Attributes:
        cost: of a verify pass.
        draft_ms: what a proposal costs, whether or not its tree is used.
        max_nodes: to ask the drafter for.
        standing: of the drafter, shared by the sequences it serves.
    """

    cost: VerifyCost
    draft_ms: float
    max_nodes: int
    standing: Standing = field(default_factory=Standing)
    _promise: float = 0.0  # Σ probability of the tree that was cut last
    _curve: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _curve_at: int = -1

    @property
    def resting(self) -> bool:
        return self.standing.resting

    def cut(self, tree: DraftTree, history: int) -> DraftTree:
        """The part of `tree` with the highest (1 + Σ probability) / (t(n) + draft time); empty where plain decoding is best.

        A draft that was sampled stays whole: leaving nodes out by what was drawn would bend the output's distribution.
        """
        self._promise = 0.0
        if not len(tree) or tree.draft_probs is not None:
            return tree
        cost = self._cost(history)
        probabilities = np.sort(np.exp(tree.log_probs.astype(np.float64)))[::-1][: MAX_ROWS - 1]
        promises = np.concatenate([[0.0], np.cumsum(probabilities)])
        rates = (1 + self.standing.record.trust * promises) / (cost[1 : 1 + len(promises)] + self.draft_ms)
        nodes = int(rates.argmax())
        if rates[nodes] < GAIN * rates[0]:
            nodes = 0
        self._promise = float(promises[nodes])
        return tree.best(nodes, len(tree)) if nodes else empty_tree()

    def observe(self, tokens: int, nodes: int, history: int, drafted: bool) -> None:
        """Book one round: `tokens` came of a verify pass over `nodes` nodes; `drafted` says whether a draft was asked for."""
        if not drafted:
            self.standing.rested()
            return
        self.standing.record.add(self._promise, tokens - 1 if self._promise else 0)
        cost = self._cost(history)
        self.standing.book(tokens, cost[1 + nodes] + self.draft_ms, tokens * cost[1])

    def _cost(self, history: int) -> NDArray[np.float64]:
        if history // HISTORY_STEP != self._curve_at:
            self._curve_at = history // HISTORY_STEP
            self._curve = self.cost.curve(history)
        return self._curve

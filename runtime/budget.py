"""How much of a draft is worth verifying: the part of the tree that brings the most tokens per second.

A verify pass over n nodes costs t(n), measured; the tokens it brings are 1 + Σ path probability. Nodes are taken in falling
probability, so the best part of a tree is a prefix of that order (design, the loop; OPT-Tree, arXiv 2406.17276; Sequoia,
arXiv 2402.12374). When the tokens that really come do not pay for the drafting, the drafter rests.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .engine import MAX_ROWS
from .tree import DraftTree, empty_tree

HISTORY_STEP = 64  # tokens of history over which a cost curve is reused
WINDOW = 32  # drafted rounds after which the account is settled
SHORTEST_REST, LONGEST_REST = 32, 1024  # plain rounds before the drafter is tried again


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
class Budget:
    """One sequence's budget for one drafter.

    Attributes:
        cost: of a verify pass.
        draft_ms: what a proposal costs, whether or not its tree is used.
        max_nodes: to ask the drafter for.
    """

    cost: VerifyCost
    draft_ms: float
    max_nodes: int
    _account: Account = field(default_factory=Account)
    _rest: int = 0  # plain rounds still to go
    _next_rest: int = SHORTEST_REST
    _curve: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _curve_at: int = -1

    @property
    def resting(self) -> bool:
        return self._rest > 0

    def cut(self, tree: DraftTree, history: int) -> DraftTree:
        """The part of `tree` with the highest (1 + Σ probability) / (t(n) + draft time); empty where plain decoding is best.

        A draft that was sampled stays whole: leaving nodes out by what was drawn would bend the output's distribution.
        """
        if not len(tree) or tree.draft_probs is not None:
            return tree
        cost = self._cost(history)
        probabilities = np.sort(np.exp(tree.log_probs.astype(np.float64)))[::-1][: MAX_ROWS - 1]
        tokens = 1 + np.concatenate([[0.0], np.cumsum(probabilities)])
        rates = tokens / (cost[1 : 1 + len(tokens)] + self.draft_ms)
        nodes = int(rates.argmax())
        return tree.best(nodes, len(tree)) if nodes else empty_tree()

    def observe(self, tokens: int, nodes: int, history: int, drafted: bool) -> None:
        """Book one round: `tokens` came of a verify pass over `nodes` nodes; `drafted` says whether a draft was asked for."""
        if not drafted:
            self._rest = max(0, self._rest - 1)
            return
        cost, account = self._cost(history), self._account
        account.rounds += 1
        account.tokens += tokens
        account.milliseconds += cost[1 + nodes] + self.draft_ms
        account.plain_milliseconds += tokens * cost[1]
        if account.rounds >= WINDOW:
            self._settle()

    def _settle(self) -> None:
        """Rest when plain decoding would have been faster, twice as long each time in a row."""
        if self._account.plain_milliseconds < self._account.milliseconds:
            self._rest = self._next_rest
            self._next_rest = min(2 * self._next_rest, LONGEST_REST)
        else:
            self._next_rest = SHORTEST_REST
        self._account = Account()

    def _cost(self, history: int) -> NDArray[np.float64]:
        if history // HISTORY_STEP != self._curve_at:
            self._curve_at = history // HISTORY_STEP
            self._curve = self.cost.curve(history)
        return self._curve

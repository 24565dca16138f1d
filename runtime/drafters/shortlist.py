"""A short list of the vocabulary decides tokens provisionally; the whole LM head checks several of them at once.

The target drafts for itself, with an LM head cut to the tokens that texts use most (as FR-Spec, arXiv 2502.14856, and
VocabTrim, arXiv 2506.22694, cut a drafter's) and to those that this text uses already. Its hidden states are the target's own,
so that checking a token costs no further pass: one run of the LM head, which takes little longer for eight rows than for one.
What is checked is a chain, and the scheduler accepts of it what it accepts of any draft. Another drafter may propose trees for
the provisional passes, as in cascade speculative drafting (arXiv 2312.11462).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.graph import Graph
from headstart.runtime.lm_head_rows import lm_head_rows
from headstart.runtime.tree import DraftTree, empty_tree
from headstart.runtime.verify_cost import RunningCost

from .base import DraftRequest, DraftSequence, Features, Target
from .text_index import TextIndexDrafter

SHORTLIST = "shortlist"  # the family's name in a bundle
FIRST_WAIT, LONGEST_WAIT = 8, 32  # provisional tokens until the whole LM head is run, and the most of them
FORGET = 0.95  # weight of earlier checks in what is known of misses
PRIOR_TOKENS, PRIOR_MISSES = 30.0, 1.0  # seen before anything was
REST = 64  # rounds without the short list, where waiting does not pay


@dataclass(frozen=True)
class ShortScores:
    """The logits of some tokens of the vocabulary (a `graph.Scores`); the others count as minus infinity.

    Attributes:
        ids, logits: the short list's K tokens, and [R, K] float32.
        own_ids, own_rows: the text's own tokens, none of them listed, and their rows of the LM head, [n, H]; possibly none.
        hidden: [R, H] what `logits` were computed from.
        vocab_size: V.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    own_ids: NDArray[np.int64]
    own_rows: NDArray[np.float32]
    hidden: NDArray[np.float32]
    vocab_size: int

    def _own_logits(self, row: int) -> NDArray[np.float32]:
        """[n] of one row. A product of several rows would wake numpy's threads, which then spin on the decoder's cores."""
        logits: NDArray[np.float32] = self.own_rows @ self.hidden[row]
        return logits

    def best(self, row: int) -> int:
        """One of the highest: which of equals the target takes is decided with its whole vocabulary."""
        listed, own = self.logits[row], self._own_logits(row)
        if own.size and own.max() > listed.max():
            return int(self.own_ids[own.argmax()])
        return int(self.ids[listed.argmax()])

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        whole = np.full(self.vocab_size, -np.inf, np.float32)
        whole[self.ids] = self.logits[row]
        whole[self.own_ids] = self._own_logits(row)
        return whole


class Shortlist:
    """Some rows of a target's LM head, as a graph, and any others on demand."""

    def __init__(self, graph: Graph, bundle: Bundle) -> None:
        """`graph`: hidden [B, R, H] to short_logits [B, R, K] and short_ids [K]."""
        self._graph, self._bundle = graph, bundle

    @property
    def width(self) -> int:
        """H."""
        return self._bundle.manifest.model.hidden_size

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """[K] the tokens listed, rising."""
        outputs = self._graph.run({contract.HIDDEN: np.zeros((1, 1, self.width), np.float32)})
        return np.array(outputs[contract.SHORT_IDS])

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """[R, H] to [R, K]."""
        logits: NDArray[np.float32] = self._graph.run({contract.HIDDEN: hidden[None]})[contract.SHORT_LOGITS][0]
        return logits

    def rows(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """[n, H] float32 of any tokens."""
        return lm_head_rows(self._bundle.path, self._bundle.manifest.weights, self.width, tokens).floats()


class TextRows:
    """The rows of one text's tokens, and of its source's, that the short list lacks."""

    def __init__(self, shortlist: Shortlist, source_ids: Sequence[int] = ()) -> None:
        self._shortlist = shortlist
        self._listed = frozenset(shortlist.ids.tolist())
        self._ids: list[int] = []
        self._seen: set[int] = set()
        self._rows = np.zeros((0, shortlist.width), np.float32)  # of `_ids`, and room for more
        self._known = 0  # tokens of the text
        self._add(source_ids)

    def update(self, token_ids: Sequence[int]) -> None:
        """Take in the text so far. The rows of tokens that were taken back stay: they may come again."""
        self._add(token_ids[min(self._known, len(token_ids)) :])
        self._known = len(token_ids)

    def _add(self, token_ids: Sequence[int]) -> None:
        new = [token for token in dict.fromkeys(token_ids) if token not in self._listed and token not in self._seen]
        if not new:
            return
        rows, used = self._shortlist.rows(np.array(new, np.int64)), len(self._ids)
        if used + len(new) > len(self._rows):
            larger = np.zeros((2 * (used + len(new)), self._shortlist.width), np.float32)
            larger[:used] = self._rows[:used]
            self._rows = larger
        self._rows[used : used + len(new)] = rows
        self._ids += new
        self._seen.update(new)

    def scores(self, hidden: NDArray[np.float32], vocab_size: int) -> ShortScores:
        """Of [R, H], over the short list and this text's own tokens."""
        own = self._rows[: len(self._ids)]
        ids, logits = self._shortlist.ids, self._shortlist.logits(hidden)
        return ShortScores(ids, logits, np.array(self._ids, np.int64), own, hidden, vocab_size)


@dataclass
class Rates:
    """What is known of a short list from all texts: milliseconds of the LM head by rows, and how often the list misses."""

    lm_head: RunningCost = field(default_factory=RunningCost)
    checked: float = PRIOR_TOKENS
    misses: float = PRIOR_MISSES

    def add(self, tokens: int, missed: bool, milliseconds: float, kept: int) -> None:
        """The LM head was run for that many tokens, and `kept` of them, its own in place of the one `missed` included."""
        self.lm_head.observe(1, tokens, milliseconds)
        self.checked = FORGET * self.checked + kept
        self.misses = FORGET * self.misses + missed


class Wait:
    """How many provisional tokens of one text to gather before the whole LM head checks them.

    What brings the most tokens per millisecond: with a miss rate m, P tokens at c milliseconds each bring Σ (1 - m)^i, i < P,
    and the LM head takes h(P). Texts differ in m: each begins with what others showed, and soon goes by its own.

    Attributes:
        tokens: P.
    """

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._checked, self._misses = PRIOR_TOKENS, PRIOR_TOKENS * rates.misses / rates.checked
        self._milliseconds = self._gathered = 0.0  # of provisional tokens, fading like them
        self._rest = 0
        self.tokens = FIRST_WAIT

    @property
    def resting(self) -> bool:
        return self._rest > 0

    def rested(self) -> None:
        """A round without the short list has passed."""
        self._rest = max(0, self._rest - 1)

    def rest(self) -> None:
        """The list cannot be used for this text at the moment."""
        self._rest = REST

    def gathered(self, tokens: int, milliseconds: float) -> None:
        """A provisional round."""
        self._gathered = FORGET * self._gathered + tokens
        self._milliseconds = FORGET * self._milliseconds + milliseconds

    def checked(self, tokens: int, kept: int, missed: bool, milliseconds: float) -> None:
        """See `Rates.add`."""
        self._rates.add(tokens, missed, milliseconds, kept)
        self._checked = FORGET * self._checked + kept
        self._misses = FORGET * self._misses + missed
        self.tokens = self._best()
        if self.tokens == 1:  # every token is checked by itself: that is plain decoding, and a list for nothing
            self.rest()
            self.tokens = FIRST_WAIT

    def _best(self) -> int:
        miss_rate = min(1.0, self._misses / self._checked)
        count = np.arange(1, LONGEST_WAIT + 1)
        brings = np.cumsum((1 - miss_rate) ** (count - 1))
        each = self._milliseconds / max(self._gathered, 1.0)
        return int(count[(brings / (each * count + self._rates.lm_head.curve(1, 0)[count])).argmax()])


class ShortlistDrafter:
    """A short list, alone or with a drafter that copies text.

    The scheduler runs what this drafter is about; where it cannot (several sequences at once, sampling), only the other drafter
    drafts.

    Attributes:
        cost: t(1, n) of provisional passes.
    """

    def __init__(self, name: str, shortlist: Shortlist, vocab_size: int, copies: TextIndexDrafter[Any] | None = None) -> None:
        self.name = name if copies is None else f"{copies.name}+{name}"
        self._list_name, self._shortlist, self._vocab_size, self._copies = name, shortlist, vocab_size, copies
        self._waits: dict[int, Wait] = {}
        self._texts: dict[int, TextRows] = {}  # from the first provisional pass on
        self.cost, self._rates = RunningCost(), Rates()
        self.reads: frozenset[str] = frozenset()
        self.class_count = 0 if copies is None else copies.class_count
        self.default_nodes = 0 if copies is None else copies.default_nodes

    def after(self, copies: TextIndexDrafter[Any]) -> "ShortlistDrafter":
        """The same short list, with a drafter that proposes trees for provisional passes."""
        return ShortlistDrafter(self._list_name, self._shortlist, self._vocab_size, copies)

    def prior_rates(self) -> list[float]:
        return [] if self._copies is None else self._copies.prior_rates()

    def use_rates(self, rates: Sequence[float]) -> None:
        if self._copies is not None:
            self._copies.use_rates(rates)

    def open(self, sequence: DraftSequence, target: Target) -> None:
        self._waits[sequence.id] = Wait(self._rates)
        if self._copies is not None:
            self._copies.open(sequence, target)

    def observe(self, sequence: DraftSequence, rows: Features, path: Sequence[int]) -> None:
        """No-op: what is read is the text."""

    def price(self, nodes: int, depth: int) -> float:
        return 0.0 if self._copies is None else self._copies.price(nodes, depth)

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        return [empty_tree() for _ in requests] if self._copies is None else self._copies.propose(requests)

    def close(self, sequence: DraftSequence) -> None:
        self._waits.pop(sequence.id, None)
        self._texts.pop(sequence.id, None)
        if self._copies is not None:
            self._copies.close(sequence)

    def scores(self, sequence: DraftSequence, hidden: NDArray[np.float32]) -> ShortScores:
        """Of the hidden states [R, H] of rows of that sequence."""
        if sequence.id not in self._texts:
            self._texts[sequence.id] = TextRows(self._shortlist, sequence.source_ids)
        text = self._texts[sequence.id]
        text.update(sequence.token_ids)
        return text.scores(hidden, self._vocab_size)

    def wait(self, sequence: DraftSequence) -> Wait:
        """How many provisional tokens of that sequence to gather."""
        return self._waits[sequence.id]

    def taken_back(self, sequence: DraftSequence, known: int) -> None:
        """All but the first `known` tokens were provisional, and are others now."""
        if self._copies is not None:
            self._copies.taken_back(sequence, known)

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

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.graph import Graph
from headstart.runtime.token_rows import LM_HEAD, TokenTable
from headstart.runtime.tree import DraftTree, empty_tree
from headstart.runtime.verify_cost import CostModel, RunningCost

from .base import Drafter, DraftRequest, DraftSequence, Features, Target, step

SHORTLIST = "shortlist"  # the family's name in a bundle
FIRST_WAIT, LONGEST_WAIT = 8, 32  # provisional tokens before the first check, and the most before any
# Confidence, the probability of the chosen token among those that were scored: the lowest of each band, and how often its
# tokens are missed. Priors, measured with 16,384 of Gemma 3's 262,144 tokens, which weigh as much as PRIOR_TOKENS of each band.
CONFIDENCES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.8)
PRIOR_MISSES = (0.5, 0.2, 0.08, 0.04, 0.005, 0.002)
PRIOR_TOKENS, MOST_TOKENS = 10.0, 200.0  # as many of a band count at most, so that other texts soon do
FORGET = 0.95  # weight of earlier checks in what is known of milliseconds
LEAST_KEPT, ENOUGH_CHECKS = 1.25, 8  # tokens a check must bring on average, after so many checks
REST = 64  # rounds without the short list, where it brings nothing


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
    _computed: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # by row

    def _own_logits(self, row: int) -> NDArray[np.float32]:
        """[n] of one row. A product of several rows would wake numpy's threads, which then spin on the decoder's cores."""
        if row not in self._computed:
            self._computed[row] = self.own_rows @ self.hidden[row]
        return self._computed[row]

    def best(self, row: int) -> int:
        """One of the highest: which of equals the target takes is decided with its whole vocabulary."""
        listed, own = self.logits[row], self._own_logits(row)
        if own.size and own.max() > listed.max():
            return int(self.own_ids[own.argmax()])
        return int(self.ids[listed.argmax()])

    def confidence(self, row: int) -> float:
        """The probability of the best token among those scored."""
        listed, own = self.logits[row], self._own_logits(row)
        best = max(float(listed.max()), float(own.max(initial=-np.inf)))
        return 1 / (float(np.exp(listed - best).sum()) + float(np.exp(own - best).sum()))

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
        return self._lm_head.rows(tokens).floats()

    @cached_property
    def _lm_head(self) -> TokenTable:
        return TokenTable(self._bundle.path, self._bundle.manifest.weights, LM_HEAD, self.width)


class TextRows:
    """The rows of one text's tokens, and of its source's, that the short list lacks."""

    def __init__(self, shortlist: Shortlist, source_ids: Sequence[int] = ()) -> None:
        self._shortlist = shortlist
        self._listed = frozenset(shortlist.ids.tolist())
        self._ids = np.zeros(0, np.int64)
        self._seen: set[int] = set()
        self._rows = np.zeros((0, shortlist.width), np.float32)  # of `_ids`, and room for more
        self._known = 0  # tokens of the text
        self._add(source_ids)

    def update(self, token_ids: Sequence[int]) -> None:
        """Take in the text so far."""
        self._add(token_ids[self._known :])
        self._known = len(token_ids)

    def taken_back(self, known: int) -> None:
        """All but the first `known` tokens are others now. Rows of those that were taken back stay: they may come again."""
        self._known = min(self._known, known)

    def _add(self, token_ids: Sequence[int]) -> None:
        new = [token for token in dict.fromkeys(token_ids) if token not in self._listed and token not in self._seen]
        if not new:
            return
        used, tokens = len(self._ids), np.array(new, np.int64)
        if used + len(new) > len(self._rows):
            larger = np.zeros((2 * (used + len(new)), self._shortlist.width), np.float32)
            larger[:used] = self._rows[:used]
            self._rows = larger
        self._rows[used : used + len(new)] = self._shortlist.rows(tokens)
        self._ids = np.concatenate([self._ids, tokens])
        self._seen.update(new)

    def scores(self, hidden: NDArray[np.float32], vocab_size: int) -> ShortScores:
        """Of [R, H], over the short list and this text's own tokens."""
        own = self._rows[: len(self._ids)]
        ids, logits = self._shortlist.ids, self._shortlist.logits(hidden)
        return ShortScores(ids, logits, self._ids, own, hidden, vocab_size)


class Pace:
    """When the whole LM head has to check what was decided provisionally.

    A token decided with little confidence is often one that the list lacks, and all that follows it is wasted. One more token,
    useful with the probability S that all before it are right, takes c + h milliseconds, h being its row of the LM head. It is
    worth gathering while S / (c + h) exceeds the tokens per millisecond of decoding so far (the marginal value theorem).
    How often tokens of which confidence are missed is learned while decoding, as are the milliseconds.
    """

    def __init__(self) -> None:
        self._seen = np.full(len(CONFIDENCES), PRIOR_TOKENS)
        self._missed = PRIOR_TOKENS * np.array(PRIOR_MISSES)
        self._lm_head = RunningCost()  # milliseconds by rows
        self._tokens = self._provisional_ms = 0.0  # of provisional rounds, fading
        self._kept = self._checks = self._ms = 0.0  # of all rounds, fading
        self._rest = 0

    def begin_round(self) -> bool:
        """Whether to use the short list in the round that begins."""
        resting = self._rest > 0
        self._rest -= resting
        return not resting

    def rest(self) -> None:
        """The list is of no use at the moment: the next REST rounds go without it."""
        self._rest = REST

    def gathered(self, tokens: int, milliseconds: float) -> None:
        """A provisional round."""
        self._tokens = FORGET * self._tokens + tokens
        self._provisional_ms = FORGET * self._provisional_ms + milliseconds

    def enough(self, confidences: Sequence[float]) -> bool:
        """Whether to check provisional tokens of these confidences now."""
        if len(confidences) >= (LONGEST_WAIT if self._checks else FIRST_WAIT):
            return True
        if not self._checks:
            return False
        right = float(np.prod([1 - self._risk(confidence) for confidence in confidences]))
        each = self._provisional_ms / self._tokens + self._row_ms()
        return right / each <= self._kept / self._ms

    def _risk(self, confidence: float) -> float:
        band = _band(confidence)
        return float(self._missed[band] / self._seen[band])

    def _row_ms(self) -> float:
        curve = self._lm_head.curve(1, 0)
        return float(curve[LONGEST_WAIT] - curve[1]) / (LONGEST_WAIT - 1)

    def checked(self, confidences: Sequence[float], kept: int, missed: bool, milliseconds: float) -> None:
        """The LM head was run for tokens of these confidences.

        `kept` of them stay, its own in place of the one that was `missed` included; those after it tell nothing.
        """
        for place, confidence in enumerate(confidences[:kept]):
            band = _band(confidence)
            self._seen[band] += 1
            self._missed[band] += missed and place == kept - 1
        fade = np.minimum(1.0, MOST_TOKENS / self._seen)
        self._seen, self._missed = fade * self._seen, fade * self._missed
        self._lm_head.observe(1, len(confidences), milliseconds)
        each = self._provisional_ms / self._tokens
        self._checks, self._kept = FORGET * self._checks + 1, FORGET * self._kept + kept
        self._ms = FORGET * self._ms + milliseconds + each * len(confidences)
        if self._kept < LEAST_KEPT * self._checks and self._checks > ENOUGH_CHECKS:
            self.rest()  # token by token that is plain decoding, and a list for nothing


def _band(confidence: float) -> int:
    """Of CONFIDENCES; the lowest where the scores hold NaN, so that the LM head sees them soon."""
    return max(0, step(CONFIDENCES, confidence))


class ShortlistDrafter:
    """A short list, alone or with a drafter that proposes trees for provisional passes.

    The scheduler runs what this drafter is about; where it cannot (several sequences at once, sampling), only the other drafter
    drafts.

    Attributes:
        cost: t(1, n) of provisional passes, learned while decoding until `headstart tune` measures it.
        pace: how many of them to make in a row.
    """

    def __init__(self, name: str, shortlist: Shortlist, vocab_size: int, proposer: Drafter | None = None) -> None:
        self.name = name if proposer is None else f"{proposer.name}+{name}"
        self._list_name, self._shortlist, self._vocab_size, self._proposer = name, shortlist, vocab_size, proposer
        self._texts: dict[int, TextRows] = {}  # from the first provisional pass on
        self.cost: CostModel = RunningCost()
        self.pace = Pace()
        self.reads: frozenset[str] = frozenset() if proposer is None else proposer.reads
        self.class_count = 0 if proposer is None else proposer.class_count
        self.default_nodes = 0 if proposer is None else proposer.default_nodes

    def after(self, proposer: Drafter) -> "ShortlistDrafter":
        """The same short list, with a drafter that proposes trees for provisional passes."""
        pair = ShortlistDrafter(self._list_name, self._shortlist, self._vocab_size, proposer)
        pair.cost = self.cost  # the passes are the same, whoever proposes
        return pair

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """The list's alone, [R, H] to [R, K]: most of what scoring a provisional pass takes."""
        return self._shortlist.logits(hidden)

    def prior_rates(self) -> list[float]:
        return [] if self._proposer is None else self._proposer.prior_rates()

    def use_rates(self, rates: Sequence[float]) -> None:
        if self._proposer is not None:
            self._proposer.use_rates(rates)

    def open(self, sequence: DraftSequence, target: Target) -> None:
        if self._proposer is not None:
            self._proposer.open(sequence, target)

    def observe(self, sequence: DraftSequence, rows: Features, path: Sequence[int]) -> None:
        if self._proposer is not None:
            self._proposer.observe(sequence, rows, path)

    def price(self, nodes: int, depth: int) -> float:
        return 0.0 if self._proposer is None else self._proposer.price(nodes, depth)

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        return [empty_tree() for _ in requests] if self._proposer is None else self._proposer.propose(requests)

    def close(self, sequence: DraftSequence) -> None:
        self._texts.pop(sequence.id, None)
        if self._proposer is not None:
            self._proposer.close(sequence)

    def scores(self, sequence: DraftSequence, hidden: NDArray[np.float32]) -> ShortScores:
        """Of the hidden states [R, H] of rows of that sequence."""
        if sequence.id not in self._texts:
            self._texts[sequence.id] = TextRows(self._shortlist, sequence.source_ids)
        text = self._texts[sequence.id]
        text.update(sequence.token_ids)
        return text.scores(hidden, self._vocab_size)

    def taken_back(self, sequence: DraftSequence, known: int) -> None:
        """All but the first `known` tokens were provisional, and are others now."""
        if sequence.id in self._texts:
            self._texts[sequence.id].taken_back(known)
        if self._proposer is not None:
            self._proposer.taken_back(sequence, known)

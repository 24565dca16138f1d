"""Greedy decoding, plain and with every drafter, judged token by token by the canonical graph.

Two outputs may differ only where the reference itself holds both tokens for equally good, within the bound that the precision
declares: a tie. Anything else is a fault, wherever in an output it stands: each output is judged in its own context to its end,
not only up to the first difference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.exporter.comparison import greedy_tokens
from headstart.exporter.golden import Texts
from headstart.runtime.graph import Engine
from headstart.runtime.model import Model, Prompt
from headstart.runtime.results import Result
from headstart.runtime.sampling import LogitRules, SamplingOptions

from .decisions import Request, request_of
from .outcome import Divergence, GreedyCheck
from .reference import Reference, Text, spread_of

Progress = Callable[[str, int, int], None]  # what, done, of
END = -1  # in place of a token id: the output had ended


@dataclass(frozen=True)
class Position:
    """What the reference says of one position of an output.

    Attributes:
        best: the token of its highest logit.
        margin: between its two best logits, over its logit range.
        gap: from the token that was chosen to the best, over its logit range; infinite for one that the rules forbid.
    """

    best: int
    margin: float
    gap: float


class Judge:
    """The reference's opinion of outputs, each output read once."""

    def __init__(self, reference: Reference, bound: float) -> None:
        self._reference, self._bound = reference, bound
        self._known: dict[tuple[int, tuple[int, ...]], list[Position]] = {}

    def positions(self, index: int, request: Request, tokens: Sequence[int]) -> list[Position]:
        """One for each of the output's `tokens`; `index` tells requests apart."""
        key = (index, tuple(tokens))
        if key not in self._known:
            text = Text((*request.start, *tokens[:-1]), request.source)
            logits = self._reference.logits(text, len(request.start) - 1)
            spreads = spread_of(logits)
            rows = zip(request.processed(tokens, logits), tokens, spreads.tolist(), strict=True)
            self._known[key] = [position(row, token, spread) for row, token, spread in rows]
        return self._known[key]

    def first_difference(self, index: int, request: Request, wanted: Sequence[int], found: Sequence[int]) -> Divergence | None:
        """Where two outputs part, None where they do not. One that ends where the other goes on is a fault."""
        shorter = min(len(wanted), len(found))
        first = next((i for i in range(shorter) if wanted[i] != found[i]), shorter)
        if first == len(wanted) == len(found):
            return None
        here = [self.positions(index, request, tokens)[first] for tokens in (wanted, found) if first < len(tokens)]
        gap = max(one.gap for one in here) if len(here) == 2 else float("inf")
        ids = [tokens[first] if first < len(tokens) else END for tokens in (wanted, found)]
        return self._divergence(index, first, ids[0], ids[1], here[0].margin, gap)

    def ruled_out(self, index: int, request: Request, tokens: Sequence[int]) -> list[Divergence]:
        """The output's tokens that are not among the reference's best."""
        positions = enumerate(self.positions(index, request, tokens))
        found = (self._divergence(index, i, p.best, tokens[i], p.margin, p.gap) for i, p in positions)
        return [one for one in found if one.kind == "fault"]

    def against_best(self, index: int, request: Request, tokens: Sequence[int]) -> Divergence | None:
        """The first token that is not the reference's best."""
        for i, one in enumerate(self.positions(index, request, tokens)):
            if one.best != tokens[i]:
                return self._divergence(index, i, one.best, tokens[i], one.margin, one.gap)
        return None

    def _divergence(self, prompt: int, token: int, expected: int, found: int, margin: float, gap: float) -> Divergence:
        kind = "tie" if gap <= self._bound else "fault"  # NaN is no tie
        return Divergence(prompt, token, expected, found, margin, gap, "tie" if kind == "tie" else "fault")


def position(logits: NDArray[np.float32], token: int, spread: float) -> Position:
    """Of [V] processed logits."""
    best, second = int(logits.argmax()), np.partition(logits, -2)[-2]
    return Position(best, float(logits[best] - second) / spread, float(logits[best] - logits[token]) / spread)


def check_recorded(
    engine: Engine, reference: Reference, golden: Mapping[str, NDArray[Any]], precision: str
) -> list[GreedyCheck]:
    """The engine's plain greedy tokens against those that the checkpoint itself gave, without end tokens or rules."""
    bound = reference.limits(precision).tie
    judge, rules = Judge(reference, bound), LogitRules(SamplingOptions())
    differences, faults, tokens = [], [], 0
    pairs = Texts(golden["input_ids"], golden.get("sources")).pairs()
    for index, ((ids, source), greedy) in enumerate(zip(pairs, golden["greedy"].tolist(), strict=True)):
        request = Request("", (), source, tuple(ids.tolist()), rules)
        found = greedy_tokens(engine, ids.tolist(), len(greedy), source).tolist()
        differences.append(judge.first_difference(index, request, greedy, found))
        faults += judge.ruled_out(index, request, found)
        tokens += len(found)
    parts = tuple(one for one in differences if one is not None)
    return [GreedyCheck("none", "golden outputs", len(differences), tokens, 1.0, bound, parts, tuple(faults))]


def check_greedy(
    model: Model, reference: Reference, prompts: Sequence[Prompt], max_new_tokens: int, precision: str, progress: Progress
) -> list[GreedyCheck]:
    """Each prompt decoded plainly and with every drafter; continuations go on past end tokens, answers end of themselves."""
    ignore_end = not model.answers
    requests = [request_of(model, prompt, max_new_tokens=max_new_tokens, ignore_end=ignore_end) for prompt in prompts]
    judge = Judge(reference, reference.limits(precision).tie)
    checks: list[GreedyCheck] = []
    plain: list[Result] = []
    for name in ("none", *model.drafters):
        results: list[Result] = []
        for done, prompt in enumerate(prompts):
            results.append(model.generate(prompt, drafter=name, max_new_tokens=max_new_tokens, ignore_end=ignore_end))
            progress("plain" if name == "none" else name, done + 1, len(prompts))
        plain = plain or results
        checks.append(_check(name, judge, requests, plain, results, reference.limits(precision).tie))
    return checks


def _check(
    name: str, judge: Judge, requests: Sequence[Request], plain: Sequence[Result], results: Sequence[Result], bound: float
) -> GreedyCheck:
    differences, faults = [], []
    for index, (request, wanted, found) in enumerate(zip(requests, plain, results, strict=True)):
        if name == "none":
            differences.append(judge.against_best(index, request, found.token_ids))
        else:
            differences.append(judge.first_difference(index, request, wanted.token_ids, found.token_ids))
        faults += judge.ruled_out(index, request, found.token_ids)
    tokens = sum(len(result.token_ids) for result in results)
    calls = sum(result.stats.verify_calls for result in results)
    return GreedyCheck(
        drafter=name,
        reference="canonical graph" if name == "none" else "plain decoding",
        prompts=len(results),
        tokens=tokens,
        acceptance_length=(tokens - len(results)) / max(calls, 1),
        tie_bound=bound,
        divergences=tuple(one for one in differences if one is not None),
        faults=tuple(faults),
    )

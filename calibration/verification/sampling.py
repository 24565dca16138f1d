"""Sampled decoding against the exact distribution: Pearson's chi-square test on short continuations of real prompts.

A few tokens are drawn after a prefix, many times, each with a seed of its own, through the whole of decoding: drafting, the
verify pass, acceptance, commit. Only the SUPPORT most probable tokens may be drawn, at a temperature that keeps them
comparable, so that all continuations can be listed. The test is of how tokens are drawn, not of logits: each continuation is
given the logits that its probability follows from, and how far the engine's own lay from them is a check of its own. (An engine
that rounds activations gives a text other logits in a pass of other rows: laws of one text and of sixteen at once differ by
total variations of up to 0.2 for Gemma 3 270M in int8, more than many a fault of drawing.)

With n samples and d degrees of freedom the report states the smallest bias, in total variation, that is found with probability
0.99 at a significance of 1e-6 (`chi_square.detectable_bias`). Seeds are fixed: equal bundles give equal reports.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headstart.runtime.acceptance import RULES
from headstart.runtime.drafters.base import Drafter, DraftRequest
from headstart.runtime.errors import OptionError
from headstart.runtime.graph import MAX_ROWS
from headstart.runtime.model import Model, Prompt
from headstart.runtime.options import GenerateOptions
from headstart.runtime.tree import ROOT, DraftTree, empty_tree

from .chi_square import POWER, SIGNIFICANCE, combined, detectable_bias, pool, tail
from .decisions import Request, request_of
from .logits import Comparison
from .outcome import LogitCheck, SamplingCheck
from .passes import Decoding, Logits
from .reference import Reference, engine_precision

Progress = Callable[[str, int, int], None]  # what, done, of
Tokens = tuple[int, ...]

NEW_TOKENS = 4  # the first follows from the prompt; then up to two drafted ones and one of the target's own
SUPPORT = 3  # tokens that may be drawn at each step
SHARPNESS = 1.5  # nats between the first and the last of them, after the prefix
LOSSLESS = [rule.name for rule in RULES.values() if rule.lossless and not rule.greedy]
PREFIXES = 2  # tested with each drafter, those of the candidates at which most drafts are accepted
CANDIDATES = 6
PILOT = 8  # samples of each candidate to choose by
LONGEST = 64  # characters of a prefix


@dataclass(frozen=True)
class Prefix:
    """A text to continue, and the exact probability of each continuation.

    Attributes:
        logits: [V] after the tokens drawn so far, after all rules: what the probabilities follow from.
    """

    request: Request
    options: GenerateOptions
    probabilities: Mapping[Tokens, float]
    logits: Mapping[Tokens, Logits]


@dataclass(frozen=True)
class GivenLogits:
    """A logit rule that puts a prefix's logits in place of the engine's, and compares the two."""

    prefix: Prefix
    comparison: Comparison

    def start(self, prompt: Sequence[int]) -> "GivenLogitsState":
        return GivenLogitsState(self)


@dataclass
class GivenLogitsState:
    rule: GivenLogits
    drawn: Tokens = ()

    def advance(self, token: int) -> None:
        self.drawn = (*self.drawn, token)

    def fork(self) -> "GivenLogitsState":
        return GivenLogitsState(self.rule, self.drawn)

    def mask(self, logits: Logits) -> None:
        given = self.rule.prefix.logits.get(self.drawn)
        if given is None:  # after a token that must not be drawn, which is a fault of its own
            return
        kept = np.isfinite(given)
        self.rule.comparison.add(logits[None, kept], given[None, kept])
        logits[:] = given

    def forbids(self, token: int) -> bool:
        return False


class OwnLogits:
    """A drafter that drafts with its own logits: those that are given are the target's."""

    def __init__(self, inner: Drafter) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        own = [dataclasses.replace(request, logits=request.logits.without(GivenLogits)) for request in requests]
        return self._inner.propose(own)


def _with_own_logits(model: Model) -> Model:
    drafters: dict[str, Any] = {name: OwnLogits(drafter) for name, drafter in model.generator.drafters.items()}
    return Model(model.bundle, model.engine, model.tokenizer, drafters)


@dataclass
class Drawn:
    """Continuations drawn of one prefix."""

    counts: Counter[Tokens]
    drafted: int = 0
    accepted: int = 0


def check_sampling(
    model: Model, reference: Reference, prompts: Sequence[Prompt], samples: int, batch: int, progress: Progress
) -> tuple[list[SamplingCheck], list[LogitCheck]]:
    """Plain decoding, then each drafter with each lossless rule that fits its drafts: `samples` continuations each.

    They are drawn in batches of at most `batch`. The logits of all passes are one more check. Both are empty where no prefix
    leaves anything to draw.
    """
    prefixes = list(_prefixes(model, prompts))
    if not prefixes:
        return [], []
    precision = engine_precision(model.engine)
    passes = Comparison("sampled passes", "engine, all in one tree", precision, reference.limits(precision))
    sampler = Sampler(_with_own_logits(model), batch, passes)
    checks: list[SamplingCheck] = []
    for name in ("none", *model.drafters):
        rules = [None] if name == "none" else LOSSLESS
        found = [sampler.check(prefixes, name, rule, samples) for rule in rules]
        fitting = [check for check in found if check is not None]
        checks += fitting or filter(None, [sampler.check(prefixes, name, None, samples)])  # drafts of several kinds
        progress("sampling", len(checks), len(checks))
    return checks, [passes.result()]


@dataclass(frozen=True)
class Sampler:
    """Draws continuations, up to `batch` at once, and notes the logits of the passes."""

    model: Model
    batch: int
    passes: Comparison

    def check(self, prefixes: Sequence[Prefix], drafter: str, rule: str | None, samples: int) -> SamplingCheck | None:
        """None where a rule is named that does not fit what the drafter proposes, or where it proposes nothing."""
        try:
            pilots = [self.draw(prefix, drafter, rule, PILOT, seed=10_000_000) for prefix in prefixes]
            if rule is not None and not any(pilot.drafted for pilot in pilots):
                return None
            order = sorted(range(len(prefixes)), key=lambda i: -pilots[i].accepted)
            chosen = [prefixes[i] for i in order[:PREFIXES]]
            share = samples // len(chosen)
            drawn = [self.draw(one, drafter, rule, share, seed=index * samples) for index, one in enumerate(chosen)]
        except OptionError:
            if rule is None:
                raise
            return None
        return judge(drafter, rule or "default", chosen, drawn)

    def draw(self, prefix: Prefix, drafter: str, rule: str | None, samples: int, seed: int) -> Drawn:
        """Continuations of a prefix, each with a seed of its own. Raises OptionError where the rule does not fit the drafts."""
        drawn = Drawn(Counter())
        request = prefix.request
        for begin in range(0, samples, self.batch):
            prompts = [request.prompt] * min(self.batch, samples - begin)
            options: GenerateOptions = {"drafter": drafter, "draft_nodes": _nodes(self.model, drafter), "acceptance": rule}
            options |= prefix.options | {"seed": seed + begin, "logit_rules": (GivenLogits(prefix, self.passes),)}
            results = self.model.generate(prompts, decoder_prompt=request.decoder_prompt, **options)
            for result in results:
                drawn.counts[tuple(result.token_ids)] += 1
                drawn.drafted += result.stats.drafted_tokens
                drawn.accepted += len(result.token_ids) - 1 - result.stats.verify_calls
        return drawn


def judge(drafter: str, rule: str, prefixes: Sequence[Prefix], drawn: Sequence[Drawn]) -> SamplingCheck:
    """All prefixes' tests as one."""
    pooled, impossible = [], 0
    for prefix, one in zip(prefixes, drawn, strict=True):
        impossible += sum(count for tokens, count in one.counts.items() if tokens not in prefix.probabilities)
        counts = np.array([one.counts[tokens] for tokens in prefix.probabilities])
        pooled.append(pool(np.array(list(prefix.probabilities.values())), counts))
    statistic, degrees = combined(pooled)
    samples = sum(one.counts.total() for one in drawn)
    return SamplingCheck(
        drafter=drafter,
        rule=rule,
        samples=samples,
        drafted=sum(one.drafted for one in drawn),
        accepted=sum(one.accepted for one in drawn),
        categories=sum(len(one.expected) for one in pooled),
        impossible=impossible,
        statistic=statistic,
        degrees=degrees,
        p_value=tail(statistic, degrees),
        significance=SIGNIFICANCE,
        total_variation=float(np.mean([one.total_variation for one in pooled])),
        detects=detectable_bias(samples, degrees),
        power=POWER,
    )


def _nodes(model: Model, name: str) -> int:
    """A tree of fixed size: a tuned budget would cut trees by what earlier samples showed."""
    drafter = model.generator.drafter(name)
    return 0 if drafter is None else drafter.default_nodes


def _prefixes(model: Model, prompts: Sequence[Prompt]) -> Iterator[Prefix]:
    found = 0
    for prompt, decoder_prompt in _candidates(model, prompts):
        prefix = exact(model, prompt, decoder_prompt)
        if found < CANDIDATES and prefix is not None:
            found += 1
            yield prefix


def _candidates(model: Model, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Tokens]]:
    """(prompt, decoder prompt): texts as they are and texts that begin anew, where n-grams know what follows; answers begun."""
    for prompt in prompts:
        if model.answers:
            start = model.input(prompt).prompt_ids
            answer = model.generate(prompt, drafter="none", max_new_tokens=2 * NEW_TOKENS).token_ids
            yield prompt, ()
            yield prompt, (*start, *answer[: len(answer) // 2])
        else:
            text = str(prompt)[:LONGEST]
            yield text, ()
            yield text + text[: 2 * len(text) // 3], ()


def exact(model: Model, prompt: Prompt, decoder_prompt: Tokens) -> Prefix | None:
    """The prefix with the probabilities of all its continuations; None where rules or room leave nothing to draw."""
    request = request_of(model, prompt, decoder_prompt, max_new_tokens=NEW_TOKENS, ignore_end=True)
    start = request.start
    if len(start) + NEW_TOKENS >= model.bundle.manifest.model.max_cache:
        return None
    decoding = Decoding(model.engine, 1, len(start) + NEW_TOKENS + MAX_ROWS, request.source)
    if len(start) > 1:
        decoding.prefill(0, start[:-1])
    logits = decoding.verify([start[-1]], [empty_tree()])[0][0]
    best = np.sort(next(iter(request.processed([0], logits[None]))))[::-1]
    if not np.isfinite(best[SUPPORT - 1]):
        return None
    temperature = round(max(float(best[0] - best[SUPPORT - 1]) / SHARPNESS, 1e-3), 6)
    options: GenerateOptions = {"max_new_tokens": NEW_TOKENS, "ignore_end": True, "temperature": temperature, "top_k": SUPPORT}
    sampled = request_of(model, prompt, decoder_prompt, **options)
    return Prefix(sampled, options, *_continuations(decoding, sampled))


def _continuations(decoding: Decoding, request: Request) -> tuple[dict[Tokens, float], dict[Tokens, Logits]]:
    """(every continuation of NEW_TOKENS tokens that can be drawn, with its probability; the logits after each part of one)."""
    nodes: list[tuple[Tokens, float]] = [((), 1.0)]  # of the level above the one that is drawn
    processed: dict[Tokens, Logits] = {}
    tree = empty_tree()
    rows: dict[Tokens, int] = {(): 0}
    for _ in range(NEW_TOKENS):
        logits = decoding.verify([request.start[-1]], [tree])[0]
        below: list[tuple[Tokens, float]] = []
        for tokens, probability in nodes:
            state = request.rules.start([*request.start, *tokens])
            processed[tokens] = state.process(logits[rows[tokens]])
            law = request.probabilities(tokens, logits[rows[tokens]])
            below += [((*tokens, int(token)), probability * float(law[token])) for token in np.flatnonzero(law)]
        nodes = below
        tree, rows = _extended(tree, rows, [tokens for tokens, _ in nodes])
    return dict(nodes), processed


def _extended(tree: DraftTree, rows: dict[Tokens, int], level: Sequence[Tokens]) -> tuple[DraftTree, dict[Tokens, int]]:
    """The tree with one more level, and the row of each of its paths."""
    ids, parents = tree.token_ids.tolist(), tree.parents.tolist()
    rows = dict(rows)
    for tokens in level:
        parents.append(rows[tokens[:-1]] - 1 if tokens[:-1] else ROOT)
        ids.append(tokens[-1])
        rows[tokens] = len(ids)
    arrays = np.array(ids, np.int64), np.array(parents, np.int64), np.zeros(len(ids), np.float32)
    return DraftTree(*arrays), rows

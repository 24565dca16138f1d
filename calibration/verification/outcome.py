"""What `verify` reports: one frozen dataclass for each kind of check, each with its verdict. Knows no engine."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["tie", "fault"]


@dataclass(frozen=True)
class Fault:
    """Something that is wrong in itself: a damaged file, NaN in a graph's weights or outputs, an invalid draft tree.

    Attributes:
        where: the file, the graph or the drafter.
        what: the rule and what was found.
    """

    where: str
    what: str


@dataclass(frozen=True)
class LogitCheck:
    """Logits against a reference, as fractions of each row's logit range (its largest logit minus its smallest).

    Attributes:
        subject: what was computed: "engine", "canonical graph", "trees", "commits", "batch", "chunked prefill".
        reference: what it was compared with: "golden outputs", "canonical graph", or the checkpoint's folder.
        precision: the row of `runtime.precision.LIMITS` that holds the two limits.
        rows: compared.
        largest: of all rows, the largest |Δlogit|.
        median: over rows, of each row's largest |Δlogit|.
        worst_text, worst_row: where the largest difference is; -1 where nothing could be compared.
        problem: why nothing could be compared; "" where it could.
    """

    subject: str
    reference: str
    precision: str
    rows: int
    largest: float
    median: float
    largest_limit: float
    median_limit: float
    worst_text: int = -1
    worst_row: int = -1
    problem: str = ""

    @property
    def ok(self) -> bool:
        """NaN is within no limit: comparisons with it are false."""
        return not self.problem and self.largest <= self.largest_limit and self.median <= self.median_limit


@dataclass(frozen=True)
class Divergence:
    """A position at which two greedy outputs differ, judged by the reference's logits there.

    Attributes:
        prompt: index of the prompt.
        token: index among the new tokens.
        expected, found: token ids; -1 is the end of an output.
        margin: between the reference's two best logits, over its logit range.
        gap: of the worse of the two tokens to the reference's best logit, over its logit range.
        kind: "tie" where `gap` is within the precision's declared bound, else "fault".
    """

    prompt: int
    token: int
    expected: int
    found: int
    margin: float
    gap: float
    kind: Kind


@dataclass(frozen=True)
class GreedyCheck:
    """Greedy decoding with one drafter ("none" is plain decoding).

    Attributes:
        reference: what the outputs were compared with: "canonical graph" for plain decoding, else "plain decoding".
        acceptance_length: new tokens per verify pass.
        tie_bound: the largest gap that counts as a tie.
        divergences: the first of each prompt.
        faults: tokens, of all outputs, that the reference rules out: their gap to its best logit is over the bound.
    """

    drafter: str
    reference: str
    prompts: int
    tokens: int
    acceptance_length: float
    tie_bound: float
    divergences: tuple[Divergence, ...]
    faults: tuple[Divergence, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.faults and all(divergence.kind == "tie" for divergence in self.divergences)


@dataclass(frozen=True)
class SamplingCheck:
    """Sampled decoding with one drafter against the exact distribution, by Pearson's chi-square test.

    Attributes:
        rule: the acceptance rule.
        samples: continuations drawn.
        accepted: drafted tokens that were accepted; with none the test says nothing about the rule.
        categories: of outcomes, pooled until each is expected `LEAST_EXPECTED` times.
        impossible: continuations of probability 0.
        statistic, degrees: chi-square and its degrees of freedom.
        p_value: of the statistic where decoding is unbiased.
        significance: below this `p_value` is a fault.
        total_variation: between the empirical and the exact distribution, over the categories.
        detects: a bias of this total variation is found with probability `power`.
    """

    drafter: str
    rule: str
    samples: int
    drafted: int
    accepted: int
    categories: int
    impossible: int
    statistic: float
    degrees: int
    p_value: float
    significance: float
    total_variation: float
    detects: float
    power: float

    @property
    def ok(self) -> bool:
        return self.impossible == 0 and self.p_value >= self.significance


@dataclass(frozen=True)
class Report:
    """The outcome of `verify`.

    Attributes:
        precision: of the engine; names its row in `runtime.precision.LIMITS`.
        notes: what was not checked, and why.
    """

    bundle: str
    device: str
    precision: str
    faults: tuple[Fault, ...]
    logits: tuple[LogitCheck, ...] = ()
    greedy: tuple[GreedyCheck, ...] = ()
    sampling: tuple[SamplingCheck, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        computed = (
            all(one.ok for one in self.logits) and all(one.ok for one in self.greedy) and all(one.ok for one in self.sampling)
        )
        return not self.faults and computed

"""`headstart demo`: the shipped sample goes the whole way, and a table says what came of it.

Export, verify, then decode held-out prompts with every drafter, greedy and sampled, in interleaved rounds.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import headstart
from headstart.runtime.errors import BundleError
from headstart.runtime.model import Model, Result
from headstart.runtime.prompts import read_prompts

from .screen import counted, show_report, stages

SAMPLE = "pycode"
NEW_TOKENS = 128
VERIFIED_PROMPTS = 8
TEMPERATURES = (0.0, 0.7)


@dataclass(frozen=True)
class DemoRow:
    """One drafter at one temperature over all prompts.

    Attributes:
        tokens_per_s: median over rounds.
        speedup: tokens_per_s over plain decoding's at the same temperature.
        acceptance_length: new tokens per verify call.
        equal: the tokens are those of plain decoding; None where sampling makes texts differ.
        distinct_4grams: share of the outputs' 4-grams that are distinct, so that loops cannot flatter the drafter.
    """

    sample: str
    drafter: str
    device: str
    temperature: float
    tokens_per_s: float
    speedup: float
    acceptance_length: float
    verify_calls: int
    equal: bool | None
    distinct_4grams: float


@dataclass(frozen=True)
class DemoTable:
    title: str
    rows: tuple[DemoRow, ...]
    verified: bool

    @property
    def ok(self) -> bool:
        return self.verified and all(row.equal is not False for row in self.rows)


def run(output: Path, samples: Path | None, prompt_count: int, rounds: int) -> DemoTable:
    """Export, verify and measure the sample. The bundle goes to `output`/pycode, anew each time."""
    checkpoints = (samples or Path(__file__).parent.parent / "samples") / "checkpoints"
    checkpoint = checkpoints / SAMPLE
    if not checkpoint.is_dir():
        raise BundleError(
            f"{checkpoint} is not there: the samples come with the repository. Fix: run in a clone, or --samples DIR."
        )
    prompts = read_prompts(checkpoint / "held_out_prompts.jsonl")[:prompt_count]
    bundle = output / SAMPLE
    with stages() as progress:
        headstart.export(checkpoint, bundle, [checkpoint / "medusa"], force=True, progress=progress)
    with counted() as progress_of:
        report = headstart.verify(bundle, prompts[:VERIFIED_PROMPTS], NEW_TOKENS, checkpoint, progress=progress_of)
    show_report(report)
    rows = measure(headstart.load(bundle), prompts, rounds)
    title = f"{SAMPLE}: {len(prompts)} held-out prompts, {NEW_TOKENS} new tokens each, median of {rounds} interleaved rounds"
    return DemoTable(title, rows, report.ok)


def measure(model: Model, prompts: Sequence[str], rounds: int) -> tuple[DemoRow, ...]:
    """Every drafter at every temperature, interleaved so that a noisy moment hits all alike."""
    settings = [(temperature, drafter) for temperature in TEMPERATURES for drafter in ("none", *model.drafters)]
    results: dict[tuple[float, str], list[list[Result]]] = {setting: [] for setting in settings}
    model.generate(prompts[0], max_new_tokens=8)  # the first forward of a process allocates
    with counted() as progress:
        for done in range(rounds):
            for temperature, drafter in settings:
                options = {"max_new_tokens": NEW_TOKENS, "temperature": temperature, "seed": done, "ignore_end": True}
                batch = [model.generate(prompt, drafter=drafter, **options) for prompt in prompts]
                results[temperature, drafter].append(batch)
            progress("decoding", done + 1, rounds)
    return tuple(_row(model, setting, results) for setting in settings)


def _row(model: Model, setting: tuple[float, str], results: dict[tuple[float, str], list[list[Result]]]) -> DemoRow:
    temperature, drafter = setting
    runs, plain = results[setting], results[temperature, "none"]
    speed, plain_speed = median_speed(runs), median_speed(plain)
    calls = sum(r.stats.verify_calls for r in runs[0])
    tokens = sum(len(r.token_ids) - 1 for r in runs[0])
    equal = [r.token_ids for r in runs[0]] == [r.token_ids for r in plain[0]] if temperature == 0 else None
    return DemoRow(
        sample=SAMPLE,
        drafter=drafter,
        device=model.engine.device,
        temperature=temperature,
        tokens_per_s=round(speed, 1),
        speedup=round(speed / plain_speed, 3),
        acceptance_length=round(tokens / calls, 3),
        verify_calls=calls,
        equal=equal,
        distinct_4grams=round(distinct_4grams(runs[0]), 3),
    )


def median_speed(runs: Sequence[Sequence[Result]]) -> float:
    """Tokens per second of decoding (prompts excluded), the median over rounds."""
    return statistics.median(sum(len(r.token_ids) - 1 for r in run) / sum(r.stats.decode_s for r in run) for run in runs)


def distinct_4grams(results: Sequence[Result]) -> float:
    """Distinct 4-grams over all 4-grams, per text, averaged."""
    shares = []
    for result in results:
        grams = [tuple(result.token_ids[i : i + 4]) for i in range(len(result.token_ids) - 3)]
        shares.append(len(set(grams)) / max(len(grams), 1))
    return statistics.mean(shares)

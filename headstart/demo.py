"""`headstart demo`: the shipped sample goes the whole way, and a table says what came of it.

Export, quantize, build, tune, verify; then decode held-out prompts with every drafter, greedy and sampled, in interleaved
rounds.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import headstart
from headstart.runtime.errors import BundleError
from headstart.runtime.model import Model, Result
from headstart.runtime.prompts import read_prompts

from .screen import counted, show_report, show_tuning, stages

SAMPLE = "pycode"
NEW_TOKENS = 128
VERIFIED_PROMPTS = 8
TUNING_PROMPTS = 16  # the file's last, which are not measured
TEMPERATURES = (0.0, 0.7)


@dataclass(frozen=True)
class Setting:
    """One column of the interleaved rounds."""

    weights: str
    temperature: float
    drafter: str


@dataclass(frozen=True)
class DemoRow:
    """One drafter at one temperature over all prompts.

    Attributes:
        tokens_per_s: median over rounds.
        speedup: tokens_per_s over plain decoding's at the same temperature.
        acceptance_length: new tokens per verify call.
        equal: prompts whose tokens are those of plain decoding; None where sampling makes texts differ.
        prompts: of how many.
        distinct_4grams: share of the outputs' 4-grams that are distinct, so that loops cannot flatter the drafter.
    """

    sample: str
    weights: str
    drafter: str
    device: str
    temperature: float
    tokens_per_s: float
    speedup: float
    acceptance_length: float
    verify_calls: int
    equal: int | None
    prompts: int
    distinct_4grams: float


@dataclass(frozen=True)
class DemoTable:
    title: str
    rows: tuple[DemoRow, ...]
    verified: bool

    @property
    def ok(self) -> bool:
        """No fault; where integers round, `verify` has named what a tree's near-ties may change."""
        exact = [row for row in self.rows if row.weights == "float32" and row.equal is not None]
        return self.verified and all(row.equal == row.prompts for row in exact)


def run(output: Path, samples: Path | None, prompt_count: int, rounds: int) -> DemoTable:
    """Take the sample the whole way. Its bundles go to `output`/pycode and pycode-int8, anew each time."""
    checkpoints = (samples or Path(__file__).parent.parent / "samples") / "checkpoints"
    checkpoint = checkpoints / SAMPLE
    if not checkpoint.is_dir():
        raise BundleError(
            f"{checkpoint} is not there: the samples come with the repository. Fix: run in a clone, or --samples DIR."
        )
    prompts = read_prompts(checkpoint / "held_out_prompts.jsonl")
    measured, tuning = prompts[:prompt_count], prompts[-TUNING_PROMPTS:]
    bundles = {"float32": output / SAMPLE, "int8": output / f"{SAMPLE}-int8"}
    prepare(checkpoint, bundles, tuning)
    reports = []
    for weights, bundle in bundles.items():
        source = checkpoint if weights == "float32" else None
        with counted() as progress_of:
            reports.append(headstart.verify(bundle, measured[:VERIFIED_PROMPTS], NEW_TOKENS, source, progress=progress_of))
        show_report(reports[-1])
    rows = measure({weights: headstart.load(bundle) for weights, bundle in bundles.items()}, measured, rounds)
    title = f"{SAMPLE}: {len(measured)} held-out prompts, {NEW_TOKENS} new tokens each, median of {rounds} interleaved rounds"
    return DemoTable(title, rows, all(report.ok for report in reports))


def prepare(checkpoint: Path, bundles: dict[str, Path], tuning: Sequence[str]) -> None:
    """Export, quantize, build for the CPU, and tune on prompts that are not measured afterwards."""
    with stages() as progress:
        headstart.export(checkpoint, bundles["float32"], [checkpoint / "medusa"], force=True, progress=progress)
    with counted() as progress_of:
        headstart.quantize(bundles["float32"], bundles["int8"], force=True, progress=progress_of)
    for bundle in bundles.values():
        with stages() as progress:
            headstart.build(bundle, progress=progress)
        with counted() as progress_of:
            show_tuning(bundle, headstart.tune(bundle, tuning, progress=progress_of))


def measure(models: dict[str, Model], prompts: Sequence[str], rounds: int) -> tuple[DemoRow, ...]:
    """Every bundle, drafter and temperature, interleaved so that a noisy moment hits all alike."""
    settings = [
        Setting(weights, temperature, drafter)
        for temperature in TEMPERATURES
        for weights, model in models.items()
        for drafter in ("none", *model.drafters)
    ]
    results: dict[Setting, list[list[Result]]] = {setting: [] for setting in settings}
    with counted() as progress:
        for done in range(rounds):
            for setting in settings:
                options = {"temperature": setting.temperature, "seed": done, "ignore_end": True, "max_new_tokens": NEW_TOKENS}
                model = models[setting.weights]
                results[setting].append([model.generate(prompt, drafter=setting.drafter, **options) for prompt in prompts])
            progress("decoding", done + 1, rounds)
    return tuple(_row(models[setting.weights], setting, results) for setting in settings)


def _row(model: Model, setting: Setting, results: dict[Setting, list[list[Result]]]) -> DemoRow:
    runs, plain = results[setting], results[dataclasses.replace(setting, drafter="none")]
    speed, plain_speed = median_speed(runs), median_speed(plain)
    calls = sum(r.stats.verify_calls for r in runs[0])
    tokens = sum(len(r.token_ids) - 1 for r in runs[0])
    greedy = setting.temperature == 0
    return DemoRow(
        sample=SAMPLE,
        weights=setting.weights,
        drafter=setting.drafter,
        device=model.engine.device,
        temperature=setting.temperature,
        tokens_per_s=round(speed, 1),
        speedup=round(speed / plain_speed, 3),
        acceptance_length=round(tokens / calls, 3),
        verify_calls=calls,
        equal=sum(r.token_ids == p.token_ids for r, p in zip(runs[0], plain[0], strict=True)) if greedy else None,
        prompts=len(runs[0]),
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

"""`headstart demo`: the whole pipeline on the shipped samples, and on published checkpoints that were fetched, in one table.

Export, quantize, build, tune, verify; then decode held-out prompts with every drafter, greedy and sampled, in interleaved
rounds.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import headstart
from headstart.runtime.errors import BundleError, OptionError
from headstart.runtime.model import Model, Prompt
from headstart.runtime.prompts import read_answers
from headstart.runtime.results import Result

from .screen import counted, out, show_report, show_tuning, stages, table

VERIFIED_PROMPTS, VERIFIED_SAMPLES = 4, 100
TUNING_PROMPTS = 4  # the file's last, which are not measured; of a short file, the second half


@dataclass(frozen=True)
class Extent:
    """How much is decoded: held-out prompts, interleaved rounds, and the most new tokens after each prompt."""

    prompts: int = 4
    rounds: int = 3
    new_tokens: int = 64


@dataclass(frozen=True)
class Sample:
    """A checkpoint: `checkpoints/NAME` below the samples, its heads in `medusa`; or a published one, which has no heads.

    Attributes:
        data: its held-out prompts, below the samples: JSON Lines, with the expected output where it is known.
        without: class of prompts in that file that the demo skips.
        endless: it continues texts; decoding ignores end tokens, so that all drafters write the same number of tokens.
        temperatures: to decode at.
        published: it is not shipped; samples/published/fetch.py puts it into a cache.
    """

    name: str
    data: str
    without: str = ""
    endless: bool = False
    temperatures: tuple[float, ...] = (0.0,)
    published: bool = False

    def checkpoint(self, samples: Path, cache: Path) -> Path:
        return (cache if self.published else samples / "checkpoints") / self.name

    def heads(self, checkpoint: Path) -> list[Path]:
        return [] if self.published else [checkpoint / "medusa"]


RECORDINGS = "checkpoints/speech/recordings/texts.jsonl"
SAMPLES = (
    Sample("pycode", "checkpoints/pycode/held_out_prompts.jsonl", endless=True, temperatures=(0.0, 0.7)),
    Sample("normalise", "checkpoints/normalise/held_out.jsonl"),
    Sample("speech", RECORDINGS, without="long"),
    Sample("gemma-3-270m", "published/prompts.jsonl", endless=True, published=True),
    Sample("whisper-tiny.en", RECORDINGS, without="long", published=True),
    Sample("whisper-base", RECORDINGS, without="long", published=True),
)


@dataclass(frozen=True)
class Item:
    """A prompt, and the expected output if there is exactly one."""

    prompt: Prompt
    wanted: str | None


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
        right: prompts with the expected output; None where more than one is right.
        prompts: their number.
        distinct_4grams: share of the outputs' 4-grams that are distinct, since repetition favours copying drafters.
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
    right: int | None
    prompts: int
    distinct_4grams: float


@dataclass(frozen=True)
class DemoTable:
    title: str
    rows: tuple[DemoRow, ...]
    verified: bool

    @property
    def ok(self) -> bool:
        """No fault; where activations are integers, `verify` lists the near-ties that a tree may change."""
        exact = [row for row in self.rows if row.weights == "float32" and row.equal is not None]
        return self.verified and all(row.equal == row.prompts for row in exact)


def run(
    output: Path, samples: Path | None, extent: Extent, names: Sequence[str] = (), cache: Path = Path(".published")
) -> DemoTable:
    """Take samples through the whole pipeline: those named, or all, of published checkpoints those in `cache`. Bundles go to
    `output`/NAME and NAME-int8, and are replaced each time.

    Raises OptionError for an unknown sample, BundleError if one is not there.
    """
    folder = samples or Path(__file__).parent.parent / "samples"
    chosen = _chosen(names, folder, cache)
    parts = [run_sample(sample, sample.checkpoint(folder, cache), folder / sample.data, output, extent) for sample in chosen]
    title = f"Held-out prompts, up to {extent.new_tokens} new tokens each, median of {extent.rounds} interleaved rounds"
    return DemoTable(title, tuple(row for rows, _ in parts for row in rows), all(verified for _, verified in parts))


def _chosen(names: Sequence[str], folder: Path, cache: Path) -> list[Sample]:
    known = {sample.name: sample for sample in SAMPLES}
    for name in names:
        if name not in known:
            raise OptionError(f"the sample {name!r} is unknown. Choose from: {', '.join(known)}.")
    there = [sample for sample in SAMPLES if not sample.published or sample.checkpoint(folder, cache).is_dir()]
    chosen = [known[name] for name in names] or there
    for sample in chosen:
        if sample.published and sample not in there:
            raise BundleError(f"{sample.name} is not in {cache}. Fix: python samples/published/fetch.py {sample.name}.")
        if not (folder / sample.data).is_file():
            raise BundleError(
                f"{folder / sample.data} does not exist: the samples are part of the repository. "
                "Fix: run in a clone, or --samples DIR."
            )
    return chosen


def run_sample(sample: Sample, checkpoint: Path, data: Path, output: Path, extent: Extent) -> tuple[tuple[DemoRow, ...], bool]:
    """(one row for each drafter, temperature and kind of weights; whether `verify` found no fault)."""
    items = read_items(data, sample.without)
    tuning = items[-min(TUNING_PROMPTS, len(items) // 2) :]
    measured = items[: min(extent.prompts, len(items) - len(tuning))]
    prompts = [item.prompt for item in measured]
    bundles = {"float32": output / sample.name, "int8": output / f"{sample.name}-int8"}
    prepare(checkpoint, sample.heads(checkpoint), bundles, [item.prompt for item in tuning])
    reports = []
    for weights, bundle in bundles.items():
        source = checkpoint if weights == "float32" else None
        with counted() as progress_of:
            some, most = prompts[:VERIFIED_PROMPTS], extent.new_tokens
            report = headstart.verify(bundle, some, most, source, progress=progress_of, samples=VERIFIED_SAMPLES)
        reports.append(report)
        show_report(report)
    rows = measure(sample, {weights: headstart.load(bundle) for weights, bundle in bundles.items()}, measured, extent)
    return rows, all(report.ok for report in reports)


def read_items(file: Path, without: str = "") -> list[Item]:
    """The prompts of a JSON Lines file, except those of one class, each with its "target", or the "text" of its recording."""
    records = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
    pairs = zip(read_answers(file), records, strict=True)
    return [Item(prompt, wanted) for (prompt, wanted), record in pairs if not without or record.get("class") != without]


def prepare(checkpoint: Path, heads: Sequence[Path], bundles: dict[str, Path], tuning: Sequence[Prompt]) -> None:
    """Export, quantize, build for the CPU, and tune on prompts that are not measured afterwards."""
    with stages() as progress:
        headstart.export(checkpoint, bundles["float32"], list(heads), force=True, progress=progress)
    with counted() as progress_of:
        headstart.quantize(bundles["float32"], bundles["int8"], force=True, progress=progress_of)
    for bundle in bundles.values():
        with stages() as progress:
            headstart.build(bundle, progress=progress)
        with counted() as progress_of:
            show_tuning(bundle, headstart.tune(bundle, tuning, progress=progress_of))


def measure(sample: Sample, models: dict[str, Model], items: Sequence[Item], extent: Extent) -> tuple[DemoRow, ...]:
    """Every bundle, drafter and temperature, interleaved so that noise affects all of them alike."""
    settings = [
        Setting(weights, temperature, drafter)
        for temperature in sample.temperatures
        for weights, model in models.items()
        for drafter in ("none", *model.drafters)
    ]
    results: dict[Setting, list[list[Result]]] = {setting: [] for setting in settings}
    with counted() as progress:
        for done in range(extent.rounds):
            for setting in settings:
                options: dict[str, Any] = {"temperature": setting.temperature, "seed": done, "drafter": setting.drafter}
                options |= {"ignore_end": sample.endless, "max_new_tokens": extent.new_tokens}
                model = models[setting.weights]
                results[setting].append([model.generate(item.prompt, **options) for item in items])
            progress(f"decoding {sample.name}", done + 1, extent.rounds)
    return tuple(_row(sample, models[setting.weights], setting, results, items) for setting in settings)


def _row(
    sample: Sample, model: Model, setting: Setting, results: dict[Setting, list[list[Result]]], items: Sequence[Item]
) -> DemoRow:
    runs, plain = results[setting], results[dataclasses.replace(setting, drafter="none")]
    speed, plain_speed = median_speed(runs), median_speed(plain)
    calls = sum(r.stats.verify_calls for r in runs[0])
    tokens = sum(len(r.token_ids) - 1 for r in runs[0])
    greedy, wanted = setting.temperature == 0, [item.wanted for item in items]
    return DemoRow(
        sample=sample.name,
        weights=setting.weights,
        drafter=setting.drafter,
        device=model.engine.device,
        temperature=setting.temperature,
        tokens_per_s=round(speed, 1),
        speedup=round(speed / plain_speed, 3),
        acceptance_length=round(tokens / calls, 3),
        verify_calls=calls,
        equal=sum(r.token_ids == p.token_ids for r, p in zip(runs[0], plain[0], strict=True)) if greedy else None,
        right=None if None in wanted else sum(r.text.strip() == w for r, w in zip(runs[0], wanted, strict=True)),
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
        shares += [len(set(grams)) / len(grams)] if grams else []
    return statistics.mean(shares) if shares else 1.0


def show_demo(demo: DemoTable) -> None:
    columns = ("sample", "T", "weights", "drafter", "tokens/s", "× plain", "acceptance", "equal", "right", "distinct")
    grid = table(demo.title, *columns)
    for row in demo.rows:
        equal = "–" if row.equal is None else f"{row.equal} of {row.prompts}"
        speed = (f"{row.tokens_per_s:.0f}", f"{row.speedup:.2f}", f"{row.acceptance_length:.2f}")
        right = "–" if row.right is None else f"{row.right} of {row.prompts}"
        counts = (equal, right, f"{row.distinct_4grams:.0%}")
        grid.add_row(row.sample, f"{row.temperature:g}", row.weights, row.drafter, *speed, *counts)
    out.print(grid)
    out.print(
        "acceptance: new tokens per verify call. equal: outputs equal to plain decoding, token by token. right: outputs that "
        "are the expected text. distinct: share of distinct 4-grams; repetition lowers it."
    )

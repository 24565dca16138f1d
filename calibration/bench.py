"""Benchmark of a bundle on one device: the speed of each drafter on each class of prompts, and the cost of a verify pass.

Settings that are compared are interleaved in one run of several rounds; medians are reported, with the spread of the rounds.
"""

import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headstart.runtime.errors import OptionError
from headstart.runtime.memory import peak_memory_mb
from headstart.runtime.model import Model, Prompt
from headstart.runtime.tuning import processor
from headstart.runtime.verify_cost import VerifyCost

from .picture import load_pyplot
from .tune import verify_cost

Progress = Callable[[str, int, int], None]  # what, done, of


@dataclass(frozen=True)
class BenchRow:
    """One drafter on one class of prompts: medians over rounds.

    Attributes:
        prefill_tokens_per_s: prompt tokens over the time to the first token.
        ttft_ms: time to first token, median over prompts.
        decode_tokens_per_s: new tokens after the first, per second; `slowest` and `fastest` are of the rounds.
        acceptance_length: new tokens per verify call.
        round_cost: time of one draft, verify and commit, in plain decoding steps.
        speedup: decode_tokens_per_s over plain decoding's.
    """

    drafter: str
    prompt_class: str
    prefill_tokens_per_s: float
    ttft_ms: float
    decode_tokens_per_s: float
    slowest: float
    fastest: float
    acceptance_length: float
    round_cost: float
    speedup: float


@dataclass(frozen=True)
class Bench:
    """The whole measurement.

    Attributes:
        machine: processor, threads, packages.
        device: as `load` was given it; `built` is False where the canonical graph decodes, nothing being built for it.
        commit: of the repository this ran in; empty outside one.
        verify_ms: cost of a verify pass by rows, per history: {"64": {"1": ms, …}}.
        peak_memory_mb: of this process, the model included.
    """

    machine: dict[str, str]
    commit: str
    bundle: str
    device: str
    built: bool
    quantization: str
    verify_ms: dict[str, dict[str, float]]
    rows: tuple[BenchRow, ...]
    peak_memory_mb: float
    load_s: float


@dataclass(frozen=True)
class _Run:
    """One drafter, one class, one round."""

    prompt_tokens: int
    prefill_s: float
    ttft_s: float
    tokens: int
    calls: int
    decode_s: float


def bench(
    model: Model,
    prompts: Mapping[str, Sequence[Prompt]],
    max_new_tokens: int = 128,
    rounds: int = 5,
    drafters: Sequence[str] = (),
    load_s: float = 0.0,
    progress: Progress = lambda what, done, of: None,
) -> Bench:
    """Measure `drafters` (all, and "auto", when empty) on prompts by class.

    Raises OptionError for an unknown drafter or no rounds.
    """
    if rounds < 1:
        raise OptionError(f"--rounds must be at least 1, got {rounds}.")
    names = ["none", *(drafters or [*model.drafters, "auto"])]
    for name in names:
        model.generator.drafter(name)
    runs: dict[tuple[str, str], list[_Run]] = {}
    for done in range(rounds):
        for kind, texts in prompts.items():
            for name in names:
                runs.setdefault((name, kind), []).append(_run(model, name, texts, max_new_tokens))
        progress("decoding", done + 1, rounds)
    cost = verify_cost(model.engine, progress, model.input(next(iter(prompts.values()))[0]).source)
    return Bench(
        machine=machine(model.engine.threads),
        commit=_commit(),
        bundle=model.bundle.path.name,
        device=model.engine.device,
        built=model.engine.built is not None,
        quantization=", ".join(f"{k} {v}" for k, v in model.bundle.manifest.quantization.items()) or "none",
        verify_ms=_by_rows(cost),
        rows=tuple(_row(name, kind, runs) for name, kind in runs),
        peak_memory_mb=peak_memory_mb(),
        load_s=load_s,
    )


def _run(model: Model, drafter: str, texts: Sequence[Prompt], max_new_tokens: int) -> _Run:
    clocks, sequences = [], []
    for text in texts:
        result = model.generate(text, max_new_tokens=max_new_tokens, drafter=drafter, ignore_end=not model.answers)
        clocks.append((result.stats.prefill_s, result.stats.decode_s))
        sequences.append((result.prompt_tokens, len(result.token_ids) - 1, result.stats.verify_calls))
    prompt_tokens, tokens, calls = (sum(column) for column in zip(*sequences, strict=True))
    prefills = [prefill for prefill, _ in clocks]
    return _Run(prompt_tokens, sum(prefills), statistics.median(prefills), tokens, calls, sum(d for _, d in clocks))


def _row(name: str, kind: str, runs: dict[tuple[str, str], list[_Run]]) -> BenchRow:
    mine, plain = runs[name, kind], runs["none", kind]
    rates = [run.tokens / run.decode_s for run in mine]
    plain_rates = [run.tokens / run.decode_s for run in plain]
    rounds = zip(mine, plain, strict=True)
    return BenchRow(
        drafter=name,
        prompt_class=kind,
        prefill_tokens_per_s=statistics.median(run.prompt_tokens / run.prefill_s for run in mine),
        ttft_ms=1000 * statistics.median(run.ttft_s for run in mine),
        decode_tokens_per_s=statistics.median(rates),
        slowest=min(rates),
        fastest=max(rates),
        acceptance_length=mine[-1].tokens / max(mine[-1].calls, 1),
        round_cost=statistics.median((a.decode_s / max(a.calls, 1)) / (b.decode_s / max(b.calls, 1)) for a, b in rounds),
        speedup=statistics.median(a / b for a, b in zip(rates, plain_rates, strict=True)),
    )


def _by_rows(cost: VerifyCost) -> dict[str, dict[str, float]]:
    return {
        str(history): {str(rows): round(ms, 4) for rows, ms in zip(cost.single.rows, line, strict=True)}
        for history, line in zip(cost.single.histories, cost.single.milliseconds, strict=True)
    }


def machine(threads: int) -> dict[str, str]:
    """Where a figure was measured: processor, threads, system and packages."""
    return {
        "processor": processor(),
        "threads": str(threads),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": _onnxruntime(),
        "headstart": version("headstart"),
    }


def _onnxruntime() -> str:
    """Its version, whichever package brought it; a device with TensorRT alone has none."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return "none"
    return str(onnxruntime.__version__)


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def draw(result: Bench, file: Path) -> None:
    """A picture: tokens/s per drafter and class, and the verify cost over rows. Raises MissingExtraError without matplotlib."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    _draw_speeds(left, result)
    for history, line in result.verify_ms.items():
        right.plot([int(rows) for rows in line], list(line.values()), marker="o", label=f"{history} tokens of history")
    right.set(title="one verify pass", xlabel="rows", ylabel="ms", ylim=(0, None))
    right.legend()
    figure.suptitle(
        f"{result.bundle} ({result.quantization}) on {result.device}: {result.machine['processor']}, "
        f"{result.machine['threads']} threads"
    )
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _draw_speeds(axes: Any, result: Bench) -> None:
    kinds = list(dict.fromkeys(row.prompt_class for row in result.rows))
    names = list(dict.fromkeys(row.drafter for row in result.rows))
    by_name = {(row.drafter, row.prompt_class): row for row in result.rows}
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        rows = [by_name[name, kind] for name in names]
        places = [j + i * width for j in range(len(names))]
        spread = [
            [row.decode_tokens_per_s - row.slowest for row in rows],
            [row.fastest - row.decode_tokens_per_s for row in rows],
        ]
        bars = axes.bar(places, [row.decode_tokens_per_s for row in rows], width, yerr=spread, label=kind)
        axes.bar_label(bars, [f"{row.speedup:.2f} ×" for row in rows], fontsize=8)
    axes.set_xticks([j + 0.4 - width / 2 for j in range(len(names))], names, rotation=20)
    axes.set(title="decoding", ylabel="tokens/s")
    axes.legend()

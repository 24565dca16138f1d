"""What the command line prints: progress, tables, and JSON files."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from headstart.runtime.audio import load_audio
from headstart.runtime.bundle import Bundle, Manifest
from headstart.runtime.engines.info import ENGINE_FILE, EngineInfo, PlanInfo, built_engine
from headstart.runtime.errors import HeadstartError
from headstart.runtime.model import Model
from headstart.runtime.options import DecodeOptions
from headstart.runtime.output import atomic_write
from headstart.runtime.precision import LEAST_AGREEMENT, FloatAgreement
from headstart.runtime.results import Result
from headstart.runtime.speech_options import SpeechOptions
from headstart.runtime.tuning import Tuning

if TYPE_CHECKING:
    from headstart.calibration.bench import Bench
    from headstart.calibration.report import QuantizationReport
    from headstart.calibration.verification.outcome import Divergence, GreedyCheck, Report, SamplingCheck
    from headstart.exporter.memory_plan import MemoryPlan

WIDE = 132  # columns, where the output is not a terminal
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True)


@contextlib.contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """A spinner with the current stage's name and the elapsed time."""
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda stage: bar.update(task, description=stage)


@contextlib.contextmanager
def counted() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per counted step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, of: int) -> None:
            task = tasks.setdefault(what, bar.add_task(what, total=of)) if what not in tasks else tasks[what]
            bar.update(task, completed=done, total=of)

        yield update


def table(title: str, *columns: str) -> Table:
    grid = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return grid


def show_bundle(bundle: Bundle) -> None:
    manifest, model = bundle.manifest, bundle.manifest.model
    size = sum((bundle.path / name).stat().st_size for name in manifest.files)
    cache = sum(c.kv_heads * (c.key_size + c.value_size) for c in manifest.graphs["decoder"].slots)
    grid = table(f"{bundle.path}", "what", "value")
    bytes_each = 2 if model.dtype in ("float16", "bfloat16") else 4
    rows = {
        "model": f"{model.architecture}, {model.parameters / 1e6:.2f} M parameters, {model.dtype}",
        "sizes": f"{model.layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}",
        "cache": f"up to {model.max_cache} tokens, {cache * bytes_each / 1024:.1f} KiB per token",
        **({"encoder reads": _source(manifest)} if model.source else {}),
        "graphs": ", ".join(graph.file for graph in manifest.graphs.values()),
        "heads": ", ".join(manifest.heads) or "none",
        "quantization": ", ".join(f"{k} {v}" for k, v in manifest.quantization.items()) or "none",
        "engines": "; ".join(_engines(bundle)) or "none",
        "end tokens": ", ".join(map(str, manifest.generation.eos_token_ids)) or "none",
        "source": f"{manifest.provenance.source}, exported {manifest.provenance.created}",
        "written with": ", ".join(f"{name} {version}" for name, version in manifest.provenance.versions.items()),
        "files": f"{len(manifest.files)} files, {size / 1e6:.1f} MB, all hashes match",
    }
    for name, value in rows.items():
        grid.add_row(name, escape(value))
    out.print(grid)


def _engines(bundle: Bundle) -> Iterator[str]:
    """Each built engine: its device, its settings and the layers that differ from them; or that it must be rebuilt."""
    for file in sorted((bundle.path / "engines").glob(f"*/{ENGINE_FILE}")):
        try:
            device = json.loads(file.read_text("utf-8"))["device"]
            info = built_engine(bundle, device)
            assert info is not None
            yield f"{device} ({'; '.join((next(iter(info.settings.values()), 'as it is'), *_exceptions(info)))})"
        except (ValueError, KeyError, HeadstartError):
            yield f"{file.parent.name} (does not match this bundle: build it again)"


def _exceptions(info: EngineInfo) -> Iterator[str]:
    """The layers that an engine computes differently from the rest."""
    for name, plan in info.plans.items():
        for layers, what in ((plan.decomposed_attention, "decomposed"), (plan.float32_layers, "in float32")):
            if layers:
                yield f"{name} {what}: {', '.join(layers)}"


def _source(manifest: Manifest) -> str:
    shape = manifest.graphs["encoder"].inputs[0].shape
    longest = f"at most {manifest.model.max_source}" if manifest.model.max_source else "of any length"
    layers = len(manifest.graphs["decoder"].reads)
    return f"{manifest.model.source} {list(shape[1:])}, {longest}; cross-attention of {layers} layers"


def show_engine(bundle: Path, info: EngineInfo) -> None:
    grid = table(f"{bundle}: engine for {info.device}", "what", "value")
    for name, count in info.passes.items():
        grid.add_row(name.replace("_", " "), str(count))
    for name, value in info.settings.items():
        grid.add_row(name, value)
    for name, plan in info.plans.items():
        grid.add_row(name, describe_plan(plan))
    if info.plans:
        written = len(info.plans["decoder"].in_place)
        grid.add_row("cache", f"{info.cache_slots} slots, {info.batch} sequence(s); {written} tensors written in place")
        grid.add_row("peak memory of the build", f"{info.peak_memory_mb:.0f} MB")
    for name, found in info.differences.items():
        grid.add_row(f"{name} against the canonical graph", f"{found.largest:.1e} of the outputs' range")
    if not info.differences:
        grid.add_row("against the canonical graphs", "not compared: this machine cannot run the engine")
    if info.float_agreement is not None:
        grid.add_row("against the float model", describe_agreement(info.float_agreement))
    grid.add_row("built with", ", ".join(f"{name} {version}" for name, version in info.builder.items()))
    out.print(grid)


def describe_agreement(found: FloatAgreement) -> str:
    """A quantized engine against the float model, and a warning where it does not represent it."""
    poor = "" if found.greedy >= LEAST_AGREEMENT else f" (POOR: below {LEAST_AGREEMENT:.0%})"
    return f"{found.greedy:.0%} of its greedy tokens{poor}; logits {found.median:.1e} of their range off in a typical row"


def describe_plan(plan: PlanInfo) -> str:
    """Size, build time, layers with dedicated kernels, and stored types of one TensorRT plan."""
    kinds = ("kv_cache_update", "attention_output", "matrix_multiply", "dequantize")
    fused = plan.kernels.get("fused_attention", 0) // max(len(plan.profiles), 1)
    layers = ", ".join(f"{count} {name}" for name, count in plan.layers.items() if name.startswith(kinds))
    stored = ", ".join(f"{kind} {size / 1e6:.2f} MB" for kind, size in plan.weight_bytes.items())
    parts = [f"{plan.bytes / 1e6:.1f} MB in {plan.build_s:.1f} s, {len(plan.profiles)} profile(s)", layers]
    parts += [f"{fused} fused attention kernels a profile"] if fused else []
    layers_of_its_own = sum(count for name, count in plan.layers.items() if name.startswith("attention_output"))
    if plan.kernels and fused < layers_of_its_own:
        parts += [f"{layers_of_its_own - fused} attention layers that no kernel fuses, computed in parts by TensorRT"]
    parts += [stored]
    parts += [f"attention decomposed: {', '.join(plan.decomposed_attention)}"] if plan.decomposed_attention else []
    parts += [f"float32, for values beyond float16's range: {', '.join(plan.float32_layers)}"] if plan.float32_layers else []
    return "; ".join(part for part in parts if part)


def show_plans(bundle: Path, plans: "Sequence[MemoryPlan]") -> None:
    columns = ("plans", "cache", "per 1k", "scratch", "needed", "available", "fits", "build")
    grid = table(f"{bundle}: memory of a TensorRT engine in MB, predicted", "device", "--device", *columns)
    for one in plans:
        sizes = (one.engine_mb, one.cache_mb, one.cache_mb_per_1000, one.workspace_mb, one.needed_mb, one.available_mb)
        grid.add_row(
            one.device,
            one.target,
            *(f"{size:.0f}" if size >= 10 else f"{size:.1f}" for size in sizes),
            "yes" if one.fits else "NO",
            f"{one.build_mb:.0f}",
        )
    out.print(grid)
    out.print("per 1k: cache of 1,000 tokens. available: without the system's share. build: peak memory of the build itself.")


def show_tuning(bundle: Path, tuning: Tuning) -> None:
    simulated = f", predicted for {tuning.device}" if tuning.simulated else ""
    for cost in tuning.verify.batches:
        title = f"{bundle}: verify pass in ms, batch {cost.batch}{simulated}"
        grid = table(title, "history", *map(str, cost.rows))
        for history, line in zip(cost.histories, cost.milliseconds, strict=True):
            grid.add_row(str(history), *(f"{ms:.3g}" for ms in line))
        out.print(grid)
    grid = table(f"{tuning.prompts} prompts, each drafter with its budget", "drafter", "draft ms", "acceptance", "× plain")
    for name, one in tuning.drafters.items():
        grid.add_row(name, f"{one.draft_ms:.2f}", f"{one.acceptance_length:.2f}", f"{one.speedup:.2f}")
    out.print(grid)
    out.print(f"chosen: {tuning.chosen}. {tuning.reason}")


def show_bench(bench: "Bench") -> None:
    columns = ("prefill tok/s", "first token ms", "tok/s", "slowest – fastest", "× plain", "acceptance", "round cost")
    engine = bench.device if bench.built else f"{bench.device}, not built"
    grid = table(f"{bench.bundle} on {engine}: {bench.quantization}", "class", "drafter", *columns)
    for row in bench.rows:
        speed = (f"{row.decode_tokens_per_s:.1f}", f"{row.slowest:.1f} – {row.fastest:.1f}", f"{row.speedup:.2f}")
        start = (f"{row.prefill_tokens_per_s:.0f}", f"{row.ttft_ms:.1f}")
        grid.add_row(row.prompt_class, row.drafter, *start, *speed, f"{row.acceptance_length:.2f}", f"{row.round_cost:.2f}")
    out.print(grid)
    for history, line in bench.verify_ms.items():
        out.print(f"verify after {history} tokens, ms by rows: " + ", ".join(f"{n}: {ms:.2f}" for n, ms in line.items()))
    out.print(
        f"loaded in {bench.load_s:.2f} s, peak memory {bench.peak_memory_mb:.0f} MB; " + ", ".join(bench.machine.values())
    )


def show_quantization(report: "QuantizationReport") -> None:
    drafters = report.drafters
    written = [name for name in ("exact", "word_error_rate") if getattr(report.schemes[0], name) is not None]
    names = [name.replace("_", " ") for name in written]
    columns = ("perplexity", "agreement", "KL, nats", *names, *drafters, "disk MB", "memory MB")
    read = f"{report.tokens} tokens" + (f" ({report.left_out} lines too long)" if report.left_out else "")
    title = f"{report.text} on {report.device}: {read}; acceptance length on {report.prompts} prompts"
    grid = table(title, "bundle", "scheme", *columns)
    for one in report.schemes:
        quality = [f"{one.perplexity:.3f}", f"{one.agreement:.1%}", f"{one.kl:.4f}"]
        quality += [f"{getattr(one, name):.1%}" for name in written]
        lengths = (f"{one.acceptance[name]:.2f}" if name in one.acceptance else "none" for name in drafters)
        grid.add_row(one.bundle, one.scheme, *quality, *lengths, f"{one.disk_mb:.1f}", f"{one.memory_mb:.0f}")
    out.print(grid)
    if not all(one.built for one in report.schemes):
        out.print(f"Not all bundles are built for {report.device}: the others computed their canonical graph, in float32.")


def show_heads(bundle: Bundle) -> None:
    grid = table(f"{bundle.path}", "head", "family", "dialect", "heads", "candidates", "shares the LM head")
    for name in bundle.manifest.heads:
        head = bundle.head(name)
        grid.add_row(name, head.family, head.dialect, str(head.heads), str(head.top_k), "yes" if head.shared else "no")
    out.print(grid if bundle.manifest.heads else "no draft heads")


def show_accuracy(report: dict[str, Any]) -> None:
    grid = table("held-out accuracy of each head: the right token is among its top k", "head", "1", "2", "3", "5", "10")
    for index, ranks in enumerate(report["held_out_accuracy"]):
        grid.add_row(f"{index} (token t + {index + 2})", *(f"{ranks[k - 1]:.1%}" for k in (1, 2, 3, 5, 10)))
    out.print(grid)


def print_generation(model: Model, prompt: str, decoder_prompt: str, options: DecodeOptions, stream: bool, stats: bool) -> None:
    """The completion on standard output, the figures on standard error."""
    generation = model.start([prompt], decoder_prompt=decoder_prompt, **options)
    for pieces in generation.pieces():
        if stream:
            print(pieces[0], end="", flush=True)
    result = generation.results()[0]
    print("" if stream else result.text)
    if stats:
        err.print(escape(describe(result)))


def print_transcript(model: Model, recording: Path, speech: SpeechOptions, options: DecodeOptions, stats: bool) -> None:
    """The text, or segments with their times if requested; notes and figures on standard error."""
    started = time.perf_counter()
    transcript = model.transcribe(recording, speech.language, speech.task, speech.timestamps, **options)
    seconds = time.perf_counter() - started
    print_notes(transcript.notes)
    times = [f"[{segment.start:6.2f} → {segment.end:6.2f}] {segment.text}" for segment in transcript.segments]
    print("\n".join(times) if speech.timestamps else transcript.text)
    if stats:
        for window in transcript.windows:
            err.print(escape(describe(window)))
        factor = f"{seconds / transcript.duration_s:.3f} of real time"
        err.print(f"{transcript.duration_s:.2f} s of audio in {seconds:.2f} s: {factor}, including opening the graphs")


def print_captions(model: Model, recording: Path, speech: SpeechOptions, options: DecodeOptions, stats: bool) -> None:
    """A recording as a live source, one second at a time: one caption per line."""
    audio = load_audio(recording)
    print_notes(audio.notes)
    seconds = range(0, len(audio.samples), audio.sampling_rate)
    chunks = (audio.samples[begin : begin + audio.sampling_rate] for begin in seconds)
    for caption in model.stream_audio(chunks, speech.language, speech.task, **options):
        print(f"[{caption.heard_s:6.2f} s] {caption.text}")
        if stats and caption.window is not None:
            err.print(escape(describe(caption.window)))


def print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        err.print(f"note: {escape(note)}")


def describe(result: Result) -> str:
    stats = result.stats
    return (
        f"[{stats.drafter}] {len(result.token_ids)} tokens ({result.finish_reason}), {stats.tokens_per_s:.1f} tokens/s, "
        f"acceptance length {stats.acceptance_length:.2f} over {stats.verify_calls} verify calls, "
        f"prompt of {result.prompt_tokens} tokens in {1000 * stats.prefill_s:.1f} ms"
    )


def show_report(report: "Report") -> None:
    """One screen: what is broken, each comparison with its limits, each drafter, and the verdict."""
    for fault in report.faults:
        out.print(f"[bold red]FAULT[/] {escape(fault.where)}: {escape(fault.what)}")
    if report.logits:
        out.print(_logit_grid(report))
    if report.greedy:
        out.print(_greedy_grid(report.greedy))
    for check in report.greedy:
        for one in (*check.divergences, *check.faults):
            out.print(_divergence(check, one))
    if report.sampling:
        out.print(_sampling_grid(report.sampling))
    for note in report.notes:
        out.print(f"note: {escape(note)}")
    where = f"{report.bundle} on {report.device}" + (f" in {report.precision}" if report.precision else "")
    out.print(escape(where) + (": no fault" if report.ok else ": [bold red]FAULT[/], see above"))


def _logit_grid(report: "Report") -> Table:
    grid = table("|Δlogit| over each row's logit range", "what", "against", "rows", "largest", "limit", "median", "limit", "")
    for c in report.logits:
        sizes = (f"{c.largest:.1e}", f"{c.largest_limit:.0e}", f"{c.median:.1e}", f"{c.median_limit:.0e}")
        verdict = "" if c.ok else c.problem or f"FAULT: text {c.worst_text}, row {c.worst_row}"
        grid.add_row(c.subject, escape(Path(c.reference).name), str(c.rows), *sizes, escape(verdict))
    return grid


def _greedy_grid(checks: "Sequence[GreedyCheck]") -> Table:
    columns = ("prompts", "tokens", "acceptance length", "ties", "faults")
    grid = table("greedy, each token judged by the canonical graph", "drafter", "against", *columns)
    for c in checks:
        ties = sum(one.kind == "tie" for one in c.divergences)
        faults = len(c.divergences) - ties + len(c.faults)
        grid.add_row(
            c.drafter, c.reference, str(c.prompts), str(c.tokens), f"{c.acceptance_length:.2f}", str(ties), str(faults)
        )
    return grid


def _divergence(check: "GreedyCheck", one: "Divergence") -> str:
    return (
        f"{check.drafter}, prompt {one.prompt}, new token {one.token}: {one.found} where {check.reference} has {one.expected}; "
        f"top-2 margin {one.margin:.1e}, gap {one.gap:.1e}, a tie up to {check.tie_bound:.0e}: {one.kind}"
    )


def _sampling_grid(checks: "Sequence[SamplingCheck]") -> Table:
    first = checks[0]
    title = f"sampled, chi-square at significance {first.significance:.0e}; TV: total variation"
    columns = ("rule", "samples", "drafts accepted", "χ²", "degrees", "p", "TV seen", f"TV found at power {first.power}", "")
    grid = table(title, "drafter", *columns)
    for c in checks:
        sizes = (f"{c.statistic:.1f}", str(c.degrees), f"{c.p_value:.1e}", f"{c.total_variation:.3f}", f"{c.detects:.3f}")
        verdict = "" if c.ok else f"FAULT{f': {c.impossible} impossible' if c.impossible else ''}"
        grid.add_row(c.drafter, c.rule, str(c.samples), f"{c.accepted} of {c.drafted}", *sizes, verdict)
    return grid


def write_json(file: Path, value: Any) -> None:
    """Dataclasses, or lists of them, as one JSON document."""
    document = [dataclasses.asdict(v) for v in value] if isinstance(value, (list, tuple)) else dataclasses.asdict(value)
    atomic_write(file, json.dumps(document, indent=2) + "\n")
    print(f"wrote {file}", file=sys.stderr)

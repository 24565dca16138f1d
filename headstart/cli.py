"""The `headstart` command: every subcommand parses, calls one library function, and prints.

Heavy packages are imported inside the commands, so that `--help` is instant and a device without torch can decode.
"""

import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from .arguments import (
    Acceptance,
    BuildFor,
    BuiltFor,
    BundleArg,
    Device,
    DrafterName,
    DraftModel,
    Force,
    NewTokens,
    Precision,
    Threads,
    Untuned,
)
from .heads import heads
from .transcribe import transcribe

if TYPE_CHECKING:
    from headstart.runtime.model import Model
    from headstart.runtime.options import DecodeOptions

app = typer.Typer(
    help="From a Hugging Face checkpoint with draft heads to fast, lossless decoding on the edge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(heads, name="heads")
app.command()(transcribe)


def _show_version(wanted: bool) -> None:
    if wanted:
        from headstart import __version__

        print(f"headstart {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line on standard error, in place of Python's, which names a line of source code."""
    print(f"headstart: warning: {message}", file=sys.stderr)


class _Interrupted(KeyboardInterrupt):
    """A signal that ends the program, raised so that temporary files are removed as on Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _interrupt(number: int, frame: object) -> None:
    raise _Interrupted(number)


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2."""
    from headstart.runtime.errors import HeadstartError, missing_extra

    warnings.showwarning = _print_warning
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    try:
        try:
            app()
        except ModuleNotFoundError as error:
            raise missing_extra(error, "This command") from error
    except HeadstartError as error:
        print(f"headstart: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print("headstart: interrupted; nothing half-written was left.", file=sys.stderr)
        sys.exit(128 + (error.number if isinstance(error, _Interrupted) else signal.SIGINT))


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or hub name.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle's folder.", show_default=False)],
    head: Annotated[list[Path] | None, typer.Option(help="Folder of a draft head; may be repeated.")] = None,
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="Of weights and activations.")] = "float32",
    max_cache: Annotated[int | None, typer.Option(help="Longest text in tokens; the model's limit by default.")] = None,
    aux_layers: Annotated[str, typer.Option(help="hidden_states indices that heads read, e.g. 2,8,13.")] = "",
    assistant_of: Annotated[
        Path | None, typer.Option(help="Bundle with the very same encoder: leave it out here, and draft for that one.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare the exported graphs with the checkpoint.")] = True,
    force: Force = False,
) -> None:
    """Export a checkpoint, with draft heads, to a bundle."""
    from headstart.exporter.export import export as run

    from .screen import stages

    with stages() as progress:
        layers = _integers(aux_layers)
        bundle = run(checkpoint, output, head or (), dtype, max_cache, layers, force, progress, assistant_of, check)
    for note in bundle.manifest.provenance.notes:
        print(f"Note: {note}", file=sys.stderr)
    print(f"{bundle.path}: {bundle.manifest.model.architecture}, heads: {', '.join(bundle.manifest.heads) or 'none'}")


@app.command()
def quantize(
    bundle: BundleArg,
    output: Annotated[Path, typer.Option("--output", "-o", help="The quantized bundle's folder.", show_default=False)],
    weights: Annotated[Literal["int8", "int4"], typer.Option(help="Of the linear layers.")] = "int8",
    group: Annotated[int, typer.Option(help="Inputs that share an int4 scale: 16, 32, 64 or 128.")] = 32,
    method: Annotated[Literal["rtn", "awq", "gptq", "smoothquant"], typer.Option(help="rtn needs no data.")] = "rtn",
    activations: Annotated[
        Literal["dynamic", "static"], typer.Option(help="static: int8 with fixed scales, as TensorRT needs.")
    ] = "dynamic",
    kv_cache: Annotated[Literal["none", "int8"], typer.Option(help="Of the keys and values.")] = "none",
    lm_head: Annotated[Literal["int8", "none"], typer.Option(help="Of the LM head.")] = "int8",
    embedding: Annotated[Literal["int8", "none"], typer.Option(help="Of the embedding table.")] = "int8",
    heads: Annotated[Literal["int8", "none"], typer.Option(help="Of the draft heads.")] = "int8",
    data: Annotated[
        Path | None,
        typer.Option(
            help='Calibration text, or JSONL. With an encoder: sources ("prompt" or "audio"), each with its "target"; where '
            "there is none, the model writes it."
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of it to look at, as the decoder reads them.")] = 8192,
    rotation: Annotated[
        bool | None,
        typer.Option(
            "--rotation/--no-rotation",
            help="Rotate what layers read, so that 8 bits hold it; by default, but for awq and smoothquant.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Store a bundle's weights in 8 or 4 bits."""
    from headstart.calibration.quantize import QuantizeOptions
    from headstart.calibration.quantize import quantize as run

    from .screen import counted

    options = QuantizeOptions(
        weights, group, method, activations, kv_cache, lm_head, embedding, heads, calibration_tokens, rotation
    )
    with counted() as progress:
        made = run(bundle, output, options, data, force, progress)
    print(f"{made.path}: " + ", ".join(f"{key} {value}" for key, value in made.manifest.quantization.items()))


@app.command()
def build(
    bundle: BundleArg,
    device: BuildFor = "cpu",
    precision: Precision = None,
    cache: Annotated[int | None, typer.Option(help="TensorRT: tokens the caches hold; the model's limit by default.")] = None,
    batch: Annotated[int | None, typer.Option(help="TensorRT: sequences decoded together; 1 by default.")] = None,
    prefill_rows: Annotated[
        int | None, typer.Option(help="TensorRT: the most prompt tokens of one pass; 512 by default.")
    ] = None,
    source: Annotated[
        int | None, typer.Option(help="TensorRT: tokens of the longest source of an encoder-decoder; 512 by default.")
    ] = None,
    audio_seconds: Annotated[
        float | None, typer.Option(help="TensorRT: the longest recording, for models that take any length; 30 by default.")
    ] = None,
    fits: Annotated[str | None, typer.Option(help="TensorRT: stop unless it fits this board; see headstart plan.")] = None,
    workspace_mb: Annotated[int | None, typer.Option(help="TensorRT: the most scratch memory of a kernel.")] = None,
    optimization_level: Annotated[int | None, typer.Option(help="TensorRT: 0 to 5.")] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="Classic TensorRT: keeps timings between builds.")] = None,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="TensorRT: a plan without weights, and the graph they come from.")
    ] = False,
    refit: Annotated[bool, typer.Option("--refit", help="TensorRT: weights can be exchanged later.")] = False,
    version_compatible: Annotated[bool, typer.Option("--version-compatible", help="TensorRT: newer versions load it.")] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="Classic TensorRT: newer GPUs run it.")
    ] = False,
    force: Force = False,
) -> None:
    """Prepare a bundle's graphs for one device."""
    from headstart.exporter.build import build as run
    from headstart.exporter.targets.options import options_for

    from .screen import show_engine, stages

    given = {
        "precision": precision,
        "cache": cache,
        "batch": batch,
        "prefill_rows": prefill_rows,
        "source": source,
        "audio_seconds": audio_seconds,
        "fits": fits,
        "workspace_mb": workspace_mb,
        "optimization_level": optimization_level,
        "timing_cache": timing_cache,
        "strip_weights": strip_weights,
        "refit": refit,
        "version_compatible": version_compatible,
        "hardware_compatible": hardware_compatible,
    }
    with stages() as progress:
        info = run(bundle, device, force=force, progress=progress, options=options_for(device, given))
    show_engine(bundle, info)


@app.command()
def plan(
    bundle: BundleArg,
    on: Annotated[list[str] | None, typer.Option(help="A board; may be repeated. All by default.")] = None,
    precision: Annotated[Literal["float16", "bfloat16"], typer.Option(help="Of a float32 bundle.")] = "float16",
    cache: Annotated[int | None, typer.Option(help="Tokens the caches hold; the model's limit by default.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    prefill_rows: Annotated[int, typer.Option(help="The most prompt tokens of one pass.")] = 512,
    source: Annotated[int, typer.Option(help="Tokens of the longest source of an encoder-decoder.")] = 512,
    audio_seconds: Annotated[float | None, typer.Option(help="The longest recording; 30 by default.")] = None,
) -> None:
    """The memory a TensorRT engine will need, before it is built, and the boards it fits."""
    from headstart.exporter.devices import DEVICES
    from headstart.exporter.memory_plan import memory_plan
    from headstart.exporter.tensorrt.options import TensorRtOptions

    from .screen import show_plans

    options = TensorRtOptions(
        precision=precision,
        cache=cache,
        batch=batch,
        prefill_rows=prefill_rows,
        source=source,
        audio_seconds=audio_seconds,
    )
    show_plans(bundle, [memory_plan(bundle, name, options) for name in on or DEVICES])


@app.command()
def inspect(bundle: BundleArg) -> None:
    """Show what a bundle holds, on one screen."""
    from headstart.runtime.bundle import Bundle

    from .screen import show_bundle

    show_bundle(Bundle.load(bundle))


@app.command()
def upgrade(bundle: BundleArg) -> None:
    """Convert a bundle that an older Headstart wrote, in place."""
    from headstart.runtime.upgrade import outdated
    from headstart.runtime.upgrade import upgrade as run

    upgraded = run(bundle)
    print(f"{bundle}: schema {upgraded.manifest.schema_version}")
    for command in outdated(upgraded):
        print(f"to be done again: {command}")


@app.command()
def generate(
    bundle: BundleArg,
    prompt: Annotated[str | None, typer.Argument(help="The text to complete; - reads standard input.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A recording to transcribe in place of a prompt: WAV, FLAC …")] = None,
    language: Annotated[str | None, typer.Option(help="Spoken in the recording, such as en; heard by default.")] = None,
    task: Annotated[str, typer.Option(help="transcribe, or translate where the model can.")] = "transcribe",
    timestamps: Annotated[bool | None, typer.Option(help="Print segments with times; --no-timestamps decodes without.")] = None,
    max_new_tokens: NewTokens = None,
    drafter: DrafterName = None,
    draft_nodes: Annotated[int | None, typer.Option(help="Nodes of the draft tree.")] = None,
    draft_model: DraftModel = None,
    beams: Annotated[int | None, typer.Option(help="Beam search, without drafts; 0 is the checkpoint's number.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is off; the checkpoint's own when not given.")] = None,
    no_repeat_ngram: Annotated[int | None, typer.Option(help="0 is off; the checkpoint's own when not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the completion; may be repeated.")] = None,
    decoder_prompt: Annotated[str, typer.Option(help="Text an encoder-decoder's output begins with.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes; captions, with --audio.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and acceptance, on standard error.")] = False,
    acceptance: Acceptance = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Allow an acceptance rule that changes the distribution.")] = False,
    device: BuiltFor = "cpu",
    threads: Threads = None,
    untuned: Untuned = False,
) -> None:
    """Complete a prompt, or transcribe a recording."""
    from headstart.runtime.loading import load
    from headstart.runtime.options import DecodeOptions
    from headstart.runtime.speech_options import SpeechOptions

    from .screen import print_captions, print_generation, print_transcript

    drafts: DecodeOptions = {"draft_nodes": draft_nodes, "acceptance": acceptance, "lossy": lossy}
    sampling: DecodeOptions = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    rules: DecodeOptions = {"repetition_penalty": repetition_penalty, "no_repeat_ngram": no_repeat_ngram, "stop": stop or ()}
    options: DecodeOptions = {"max_new_tokens": max_new_tokens, **drafts, **sampling, **rules}
    if drafter is not None:
        options["drafter"] = drafter
    if beams is not None:
        _check_beams(audio, stream, stats, options)
    model = load(bundle, device, threads=threads, draft_model=draft_model, tuned=not untuned)
    if audio is not None:
        show = print_captions if stream else print_transcript
        show(model, audio, SpeechOptions(language, task, timestamps), options, stats)
        return
    text = _prompt(prompt)
    if chat:
        text = model.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    if beams is None:
        print_generation(model, text, decoder_prompt, options, stream, stats)
    else:
        print(_best_beam(model, text, beams, decoder_prompt, options))


def _best_beam(model: "Model", text: str, beams: int, decoder_prompt: str, options: "DecodeOptions") -> str:
    limit = options.get("max_new_tokens")
    return model.beam_search(
        text,
        beams or None,
        decoder_prompt=decoder_prompt,
        max_new_tokens=limit,
        repetition_penalty=options.get("repetition_penalty"),
        no_repeat_ngram=options.get("no_repeat_ngram"),
    )[0].text


def _check_beams(audio: Path | None, stream: bool, stats: bool, options: "DecodeOptions") -> None:
    """Raises OptionError for options that beam search does not have."""
    from headstart.runtime.errors import OptionError

    refused = ("drafter", "draft_nodes", "acceptance", "lossy", "stop", "temperature", "top_k", "min_p", "seed")
    given = {"audio": audio, "stream": stream, "stats": stats, **{name: options.get(name) for name in refused}}
    named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if named:
        raise OptionError(f"{named[0]} does not go with --beams: beam search neither drafts nor samples. Fix: leave one out.")


@app.command()
def tune(
    bundle: BundleArg,
    data: Annotated[Path, typer.Option(help="Prompts of the kind that will be decoded.", show_default=False)],
    device: Annotated[str, typer.Option(help="cpu; with --simulate a board, see headstart plan.")] = "cpu",
    simulate: Annotated[bool, typer.Option("--simulate", help="Predict for a board that is not at hand.")] = False,
    limit: Annotated[int | None, typer.Option(help="Use the first N prompts.", min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 128,
    max_nodes: Annotated[int, typer.Option(help="The most nodes of a tree.")] = 47,
    cache: Annotated[int | None, typer.Option(help="Simulated: tokens the engine's caches hold.")] = None,
    draft_model: DraftModel = None,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Measure this machine and choose the drafter and its trees; or none."""
    from headstart.calibration.tune import TuneOptions
    from headstart.calibration.tune import tune as run
    from headstart.runtime.errors import OptionError
    from headstart.runtime.prompts import read_inputs

    from .screen import counted, show_tuning

    options, prompts = TuneOptions(max_new_tokens, max_nodes), read_inputs(data)[:limit]
    if simulate and draft_model:
        raise OptionError("--simulate knows draft heads and n-grams only. Fix: leave --draft-model out.")
    with counted() as progress:
        if simulate:
            from headstart.calibration.simulate import simulate as predict

            found = predict(bundle, prompts, device, threads, cache, options, force, progress)
        else:
            found = run(bundle, prompts, device, threads, draft_model, options, force, progress)
    show_tuning(bundle, found)


@app.command()
def bench(
    bundle: BundleArg,
    prompts: Annotated[Path, typer.Option(help='Prompts; JSONL may name a "class" for each.', show_default=False)],
    limit: Annotated[int | None, typer.Option(help="Use the first N prompts of each class.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 128,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are shown.")] = 5,
    device: Device = "cpu",
    drafter: Annotated[list[str] | None, typer.Option(help="Measure this one; may be repeated. All by default.")] = None,
    draft_model: DraftModel = None,
    untuned: Untuned = False,
    threads: Threads = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw them there; needs the bench extra.")] = None,
) -> None:
    """Prefill and decode speed, acceptance length, round cost and verify cost of a bundle."""
    import time

    from headstart.calibration.bench import bench as run
    from headstart.calibration.bench import draw
    from headstart.runtime.loading import load
    from headstart.runtime.prompts import read_prompt_classes

    from .screen import counted, show_bench, write_json

    classes = {kind: texts[:limit] for kind, texts in read_prompt_classes(prompts).items()}
    started = time.perf_counter()
    model = load(bundle, device, threads, draft_model, tuned=not untuned)
    load_s = time.perf_counter() - started
    with counted() as progress:
        result = run(model, classes, max_new_tokens, rounds, drafter or (), load_s, progress)
    show_bench(result)
    if json_file:
        write_json(json_file, result)
    if png:
        draw(result, png)


@app.command()
def compare(
    bundles: Annotated[list[Path], typer.Argument(help="The reference, then quantized bundles.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help='Held-out text, or JSONL. With an encoder: sources ("prompt" or "audio"), each with its "target"; where there '
            "is none, the reference writes it.",
            show_default=False,
        ),
    ],
    prompts: Annotated[Path, typer.Option(help="Prompts for the acceptance lengths.", show_default=False)],
    limit: Annotated[int, typer.Option(help="Use the first N prompts.", min=1)] = 12,
    tokens: Annotated[int, typer.Option(help="Of the text.", min=256)] = 16384,
    device: Device = "cpu",
    threads: Threads = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw it there; needs the bench extra.")] = None,
) -> None:
    """What quantization costs: perplexity, agreement, KL, exact outputs or word error rate, acceptance length, size."""
    from headstart.calibration.report import compare as run
    from headstart.calibration.report import draw
    from headstart.runtime.prompts import read_inputs

    from .screen import counted, show_quantization, write_json

    with counted() as progress:
        texts = read_inputs(prompts)[:limit]
        report = run(bundles, data, texts, tokens, progress=progress, device=device, threads=threads)
    show_quantization(report)
    if json_file:
        write_json(json_file, report)
    if png:
        draw(report, png)


@app.command()
def verify(
    bundle: BundleArg,
    prompts: Annotated[Path | None, typer.Option(help='Text file, one prompt a line, or JSONL with "prompt".')] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first N prompts.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 128,
    checkpoint: Annotated[Path | None, typer.Option(help="Compare with this checkpoint in torch, too.")] = None,
    samples: Annotated[
        int, typer.Option(help="Continuations drawn with each drafter to test sampled decoding; 0 leaves that out.", min=0)
    ] = 1000,
    device: Device = "cpu",
    threads: Threads = None,
    draft_model: DraftModel = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there.")] = None,
) -> None:
    """Intact, equal to the checkpoint, lossless? Exit code 1 on a fault."""
    from headstart.calibration.verify import verify as run
    from headstart.runtime.prompts import read_inputs

    from .screen import counted, show_report, write_json

    texts = read_inputs(prompts)[:limit] if prompts else []
    with counted() as progress:
        report = run(bundle, texts, max_new_tokens, checkpoint, draft_model, device, progress, threads=threads, samples=samples)
    show_report(report)
    if json_file:
        write_json(json_file, report)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the exported bundle goes.")] = Path(".demo"),
    samples: Annotated[Path | None, typer.Option(help="The samples folder; the repository's own by default.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table's rows there.")] = None,
    prompts: Annotated[int, typer.Option(help="Held-out prompts to decode.", min=1)] = 4,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are shown.", min=1)] = 3,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="After each prompt.", min=1)] = 64,
    sample: Annotated[
        list[str] | None,
        typer.Option(help="pycode, normalise, speech, or a published checkpoint; may be repeated. All by default."),
    ] = None,
    published: Annotated[Path, typer.Option(help="Where samples/published/fetch.py put published checkpoints.")] = Path(
        ".published"
    ),
) -> None:
    """The whole way on the samples: export, quantize, build, tune, verify, decode with and without heads."""
    from .demo import Extent, run, show_demo
    from .screen import write_json

    table = run(output, samples, Extent(prompts, rounds, max_new_tokens), sample or (), published)
    show_demo(table)
    if json_file:
        write_json(json_file, table.rows)
    raise typer.Exit(0 if table.ok else 1)


def _integers(text: str) -> tuple[int, ...]:
    from headstart.runtime.errors import OptionError

    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise OptionError(f"--aux-layers {text!r}: whole numbers separated by commas are needed, e.g. 2,8,13.") from error


def _prompt(prompt: str | None) -> str:
    from headstart.runtime.errors import PromptError

    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        try:
            return sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise PromptError(f"Standard input is not UTF-8 text ({error}). Fix: give text.") from error
    if prompt is None:
        raise PromptError("There is no prompt. Give it as an argument, or on standard input.")
    return prompt

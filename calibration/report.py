"""What quantization costs, bundle by bundle, on held-out data and one device: in quality, in acceptance, in bytes.

Acceptance is measured as well as quality: in quantized bundles, heads that were trained on the float model's hidden states read
the quantized model's. A decoder is measured on text that it continues, an encoder-decoder on targets given their sources, which
the decoder is fed token by token; where it writes freely, its outputs are compared with the targets.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.exporter.comparison import all_logits
from headstart.runtime.bundle import GOLDEN, Bundle
from headstart.runtime.errors import OptionError
from headstart.runtime.graph import Engine
from headstart.runtime.loading import load
from headstart.runtime.model import Model, Prompt

from .answers import exact_share, word_error_rate
from .passages import Answers, Passage, of_windows, read_answered, text_windows
from .picture import load_pyplot

Progress = Callable[[str, int, int], None]  # what, done, of


@dataclass(frozen=True)
class SchemeReport:
    """One bundle as it decodes on this device.

    Attributes:
        built: for the device; False where the canonical graph was computed.
        perplexity: per token of the text, or of the targets given their sources.
        agreement: share of rows whose best token is the reference's, given the same tokens.
        kl: mean Kullback-Leibler divergence from the reference's distribution per token, in nats.
        exact: share of greedy outputs that equal their target to the letter; None where there are no targets.
        word_error_rate: of all greedy outputs against their targets; None except for recordings with targets.
        acceptance: new tokens per verify call, by drafter, greedy, untuned trees.
        disk_mb: of the bundle's own files, without built engines.
        memory_mb: resident in a fresh process after loading and 16 tokens.
    """

    bundle: str
    scheme: str
    built: bool
    perplexity: float
    agreement: float
    kl: float
    exact: float | None
    word_error_rate: float | None
    acceptance: dict[str, float]
    disk_mb: float
    memory_mb: float


@dataclass(frozen=True)
class QuantizationReport:
    """All bundles; the first is the reference.

    Attributes:
        device: that all of them were measured on.
        text: the data file's name.
        tokens: of it, as the decoder reads them.
        passages: windows of a text, or sources with their answers.
        left_out: sources that are longer than the model reads at once.
        prompts: of the acceptance lengths.
    """

    device: str
    text: str
    tokens: int
    passages: int
    left_out: int
    prompts: int
    schemes: tuple[SchemeReport, ...]

    @property
    def drafters(self) -> list[str]:
        """Of all bundles: one may have a head that another lacks."""
        return list(dict.fromkeys(name for one in self.schemes for name in one.acceptance))


def compare(
    bundles: Sequence[str | Path],
    text: str | Path,
    prompts: Sequence[Prompt] = (),
    max_tokens: int = 16384,
    max_new_tokens: int = 128,
    progress: Progress = lambda what, done, of: None,
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> QuantizationReport:
    """Measure every bundle against the first, on held-out data and with every drafter on `prompts`.

    Args:
        text: text or JSONL. For models with an encoder, sources with their targets, as `quantize` takes them; where a line has
            no target, all bundles are held against what the first writes.
        prompts: for the acceptance lengths.
        device, threads: as `load` takes them; where nothing was built for the CPU, the canonical graph is measured.

    Raises:
        OptionError: fewer than two bundles, too little text, another vocabulary, an assistant, an unknown device.
        BundleError: no bundle.
        EngineError: a bundle is not built for the device, or there is none.
        PromptError, AudioError: sources that cannot be read.
    """
    if len(bundles) < 2:
        raise OptionError("A comparison needs the reference and at least one other bundle.")
    paths = [Path(bundle) for bundle in bundles]
    infos = {str(path): Bundle.load(path).manifest.model for path in paths}
    kinds = {name: (info.vocab_size, info.source or "text it continues") for name, info in infos.items()}
    if len(set(kinds.values())) > 1:
        raise OptionError(f"The bundles differ in vocabulary or in what they read ({kinds}): they are not of one checkpoint.")
    models = [load(path, device, threads, tuned=False) for path in paths]
    read = _passages(models[0], Path(text), max_tokens)
    quality = _quality([model.engine for model in models], read.passages, progress)
    schemes = []
    for done, model in enumerate(models):
        written = _written(model, read.passages, max_new_tokens)
        schemes.append(_scheme(model, quality[done], written, _acceptance(model, prompts, max_new_tokens)))
        progress("acceptance", done + 1, len(paths))
    tokens = sum(len(passage.token_ids) for passage in read.passages)
    return QuantizationReport(device, Path(text).name, tokens, len(read.passages), read.left_out, len(prompts), tuple(schemes))


def _passages(model: Model, text: Path, max_tokens: int) -> Answers:
    info = model.bundle.manifest.model
    if info.source == "states":
        raise OptionError(
            f"{model.bundle.path} is an assistant: it reads the states of its target's encoder, which no file holds."
        )
    if info.source:
        return read_answered(model, text, max_tokens)
    windows = text_windows(model.tokenizer, text, info.max_cache, max_tokens)
    return Answers(tuple(of_windows(windows, max(1, len(model.tokenizer.opening_ids)))), left_out=0)


@dataclass
class _Quality:
    """Sums over rows."""

    rows: int = 0
    loss: float = 0.0
    agreeing: int = 0
    kl: float = 0.0


def _quality(engines: Sequence[Engine], passages: Sequence[Passage], progress: Progress) -> list[_Quality]:
    """All bundles in turn, one passage at a time: the reference's logits are never kept."""
    sums = [_Quality() for _ in engines]
    for done, passage in enumerate(passages):
        wanted = passage.token_ids[passage.given :]
        reference: NDArray[np.float64] | None = None
        for engine, total in zip(engines, sums, strict=True):
            log_probs = _log_probs(engine, passage)
            reference = log_probs if reference is None else reference
            total.rows += len(wanted)
            total.loss -= float(log_probs[np.arange(len(wanted)), wanted].sum())
            total.agreeing += int((log_probs.argmax(-1) == reference.argmax(-1)).sum())
            total.kl += float((np.exp(reference) * (reference - log_probs)).sum())
        progress("quality", done + 1, len(passages))
    return sums


def _log_probs(engine: Engine, passage: Passage) -> NDArray[np.float64]:
    """[T - given, V] of the rows that predict a token of the passage."""
    logits = all_logits(engine, passage.token_ids, passage.source)[passage.given - 1 : -1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return result


@dataclass(frozen=True)
class _Written:
    """How a model's own outputs compare with their targets, where there are any."""

    exact: float | None = None
    word_error_rate: float | None = None


def _written(model: Model, passages: Sequence[Passage], max_new_tokens: int) -> _Written:
    known = [(passage, passage.target) for passage in passages if passage.target is not None]
    if not known:
        return _Written()
    options: dict[str, Any] = {"drafter": "none", "max_new_tokens": max_new_tokens}
    texts = [model.generate(passage.prompt, decoder_prompt=passage.start, **options).text for passage, _ in known]
    targets = [target for _, target in known]
    spoken = model.bundle.manifest.model.source == "audio"
    return _Written(exact_share(texts, targets), word_error_rate(texts, targets) if spoken else None)


def _acceptance(model: Model, prompts: Sequence[Prompt], max_new_tokens: int) -> dict[str, float]:
    lengths = {}
    for name in model.drafters if prompts else ():
        results = [
            model.generate(p, drafter=name, max_new_tokens=max_new_tokens, ignore_end=not model.answers) for p in prompts
        ]
        calls = sum(r.stats.verify_calls for r in results)
        lengths[name] = sum(len(r.token_ids) - 1 for r in results) / max(calls, 1)
    return lengths


def _scheme(model: Model, quality: _Quality, written: _Written, acceptance: dict[str, float]) -> SchemeReport:
    bundle, path = model.bundle, model.bundle.path
    settings = bundle.manifest.quantization
    parts = [settings.get(name) for name in ("weights", "method", "group")]
    parts += ["static"] if settings.get("activations") == "static" else []
    parts += ["int8 cache"] if settings.get("kv_cache") == "int8" else []
    scheme = " ".join(filter(None, parts)) or "float32"
    return SchemeReport(
        bundle=path.name,
        scheme=scheme,
        built=model.engine.built is not None,
        perplexity=float(np.exp(quality.loss / quality.rows)),
        agreement=quality.agreeing / quality.rows,
        kl=quality.kl / quality.rows,
        exact=written.exact,
        word_error_rate=written.word_error_rate,
        acceptance=acceptance,
        disk_mb=sum((path / name).stat().st_size for name in bundle.manifest.files) / 1e6,
        memory_mb=_memory_mb(path, model.engine.device, model.engine.threads),
    )


def _memory_mb(path: Path, device: str, threads: int) -> float:
    """In a process of its own, so that nothing else is counted."""
    code = (
        "import sys, json, headstart, numpy\n"
        "from headstart.runtime.memory import resident_memory_mb\n"
        "model = headstart.load(sys.argv[1], sys.argv[3], int(sys.argv[4]) or None, tuned=False)\n"
        "heard = model.bundle.manifest.model.source == 'audio'\n"
        "prompt = numpy.load(sys.argv[2])['sources'][0] if heard else 'a'\n"
        "model.generate(prompt, max_new_tokens=16, drafter='none')\n"
        "print(json.dumps(resident_memory_mb()))"
    )
    command = [sys.executable, "-c", code, str(path), str(path / GOLDEN), device, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def draw(report: QuantizationReport, file: Path) -> None:
    """Perplexity over size on disk, and acceptance per drafter. Raises MissingExtraError without matplotlib."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for one in report.schemes:
        left.scatter(one.disk_mb, one.perplexity)
        left.annotate(f"{one.scheme}\nKL {one.kl:.3f}", (one.disk_mb, one.perplexity), fontsize=8)
    left.set(title=f"quality on {report.text}", xlabel="MB on disk", ylabel="perplexity")
    for name, lengths in _by_drafter(report):
        right.plot([one.scheme for one in report.schemes], lengths, marker="o", label=name)
    right.set(title=f"acceptance length, {report.prompts} prompts", ylim=(1, None))
    right.tick_params(axis="x", rotation=20)
    right.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _by_drafter(report: QuantizationReport) -> Iterator[tuple[str, list[float]]]:
    for name in report.drafters:
        yield name, [one.acceptance.get(name, float("nan")) for one in report.schemes]  # nan: a gap in the line

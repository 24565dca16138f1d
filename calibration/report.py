"""What quantization costs, bundle by bundle, on held-out text: in quality, in acceptance, in bytes.

Acceptance is measured beside quality because it is what a quantized bundle with heads is made for: a head trained on the
float model's hidden states has to live with the quantized model's.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.bundle import Bundle
from headstart.runtime.engine import Engine
from headstart.runtime.engines.info import engine_folder
from headstart.runtime.errors import OptionError
from headstart.runtime.model import load

from .passages import read_texts
from .picture import load_pyplot
from .verify import all_logits

Progress = Callable[[str, int, int], None]  # what, done, of
WINDOW = 256  # tokens seen at once; each is scored by those before it in its window


@dataclass(frozen=True)
class SchemeReport:
    """One bundle as it decodes on this device.

    Attributes:
        perplexity: per token.
        agreement: share of rows whose best token is the reference's.
        kl: mean Kullback-Leibler divergence from the reference's distribution per token, in nats.
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
    acceptance: dict[str, float]
    disk_mb: float
    memory_mb: float


@dataclass(frozen=True)
class QuantizationReport:
    """All bundles; the first is the reference."""

    text: str
    tokens: int
    prompts: int
    schemes: tuple[SchemeReport, ...]

    @property
    def drafters(self) -> list[str]:
        """Of all bundles: one may have a head that another lacks."""
        return list(dict.fromkeys(name for one in self.schemes for name in one.acceptance))


def compare(
    bundles: Sequence[str | Path],
    text: str | Path,
    prompts: Sequence[str],
    max_tokens: int = 16384,
    max_new_tokens: int = 128,
    progress: Progress = lambda what, done, of: None,
) -> QuantizationReport:
    """Measure every bundle against the first, on `text` (text or JSONL) and with every drafter on `prompts`.

    Raises OptionError for fewer than two bundles, too little text, or another vocabulary; BundleError.
    """
    if len(bundles) < 2:
        raise OptionError("A comparison needs the reference and at least one other bundle.")
    paths = [Path(bundle) for bundle in bundles]
    sizes = {str(path): Bundle.load(path).manifest.model.vocab_size for path in paths}
    if len(set(sizes.values())) > 1:
        raise OptionError(f"The bundles differ in vocabulary ({sizes}): they are not of one checkpoint.")
    windows = _windows(paths[0], Path(text), max_tokens)
    quality = _quality(paths, windows, progress)
    schemes = []
    for done, path in enumerate(paths):
        schemes.append(_scheme(path, quality[done], _acceptance(path, prompts, max_new_tokens)))
        progress("acceptance", done + 1, len(paths))
    return QuantizationReport(Path(text).name, int(windows.size), len(prompts), tuple(schemes))


def _windows(reference: Path, text: Path, max_tokens: int) -> NDArray[np.int64]:
    model = load(reference, tuned=False)
    window = min(WINDOW, model.bundle.manifest.model.max_cache)
    ids = model.tokenizer.encode("\n".join(read_texts(text)))
    if len(ids) < window:
        raise OptionError(f"{text} holds {len(ids)} tokens; at least {window} are needed. Fix: more text.")
    count = min(len(ids), max_tokens) // window
    return np.array(ids[: count * window], np.int64).reshape(count, window)


@dataclass
class _Quality:
    """Sums over rows."""

    rows: int = 0
    loss: float = 0.0
    agreeing: int = 0
    kl: float = 0.0


def _quality(paths: Sequence[Path], windows: NDArray[np.int64], progress: Progress) -> list[_Quality]:
    """All bundles side by side, one window at a time: the reference's logits are never kept."""
    engines = [load(path, tuned=False).engine for path in paths]
    for path, engine in zip(paths, engines, strict=True):
        if engine.model.source:
            raise OptionError(f"{path} has an encoder; perplexity is measured on text that a decoder continues by itself.")
    sums = [_Quality() for _ in engines]
    for done, ids in enumerate(windows):
        reference: NDArray[np.float64] | None = None
        for engine, total in zip(engines, sums, strict=True):
            log_probs = _log_probs(engine, ids)
            reference = log_probs if reference is None else reference
            total.rows += len(ids) - 1
            total.loss -= float(log_probs[np.arange(len(ids) - 1), ids[1:]].sum())
            total.agreeing += int((log_probs.argmax(-1) == reference.argmax(-1)).sum())
            total.kl += float((np.exp(reference) * (reference - log_probs)).sum())
        progress("quality", done + 1, len(windows))
    return sums


def _log_probs(engine: Engine, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """[T - 1, V] of the rows that predict a token of the window."""
    logits = all_logits(engine, ids)[:-1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return result


def _acceptance(path: Path, prompts: Sequence[str], max_new_tokens: int) -> dict[str, float]:
    model = load(path, tuned=False)
    lengths = {}
    for name in model.drafters:
        results = [
            model.generate(p, drafter=name, max_new_tokens=max_new_tokens, ignore_end=not model.answers) for p in prompts
        ]
        calls = sum(r.stats.verify_calls for r in results)
        lengths[name] = sum(len(r.token_ids) - 1 for r in results) / max(calls, 1)
    return lengths


def _scheme(path: Path, quality: _Quality, acceptance: dict[str, float]) -> SchemeReport:
    bundle = Bundle.load(path, check_hashes=False)
    settings = bundle.manifest.quantization
    parts = [settings.get(name) for name in ("weights", "method", "group")]
    parts += ["static"] if settings.get("activations") == "static" else []
    parts += ["int8 cache"] if settings.get("kv_cache") == "int8" else []
    scheme = " ".join(filter(None, parts)) or "float32"
    return SchemeReport(
        bundle=path.name,
        scheme=scheme,
        built=(engine_folder(bundle, "cpu")).is_dir(),
        perplexity=float(np.exp(quality.loss / quality.rows)),
        agreement=quality.agreeing / quality.rows,
        kl=quality.kl / quality.rows,
        acceptance=acceptance,
        disk_mb=sum((path / name).stat().st_size for name in bundle.manifest.files) / 1e6,
        memory_mb=_memory_mb(path),
    )


def _memory_mb(path: Path) -> float:
    """In a process of its own, so that nothing else is counted."""
    code = (
        "import sys, json, headstart\n"
        "from headstart.runtime.memory import resident_memory_mb\n"
        "model = headstart.load(sys.argv[1], tuned=False)\n"
        "model.generate('a', max_new_tokens=16, drafter='none')\n"
        "print(json.dumps(resident_memory_mb()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
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

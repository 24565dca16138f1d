"""A bundle's graphs to TensorRT plans: the decoder and every draft head, for one target."""

import dataclasses
import datetime
import gc
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headstart.runtime.bundle import Bundle
from headstart.runtime.engine import MAX_ROWS
from headstart.runtime.engines.info import ENGINE_SCHEMA, EngineInfo, PlanInfo, Profile, engine_source
from headstart.runtime.errors import EngineError, OptionError
from headstart.runtime.memory import peak_memory_mb

from .builder import BuilderOptions, build_plan
from .library import Library, open_library, parse_target
from .profiles import decoder_profiles, head_profiles
from .recordings import encoder_profiles, frontend_profiles, source_rows

Progress = Callable[[str], None]
LEAST_TOKENS = 16
PRECISIONS = ("float16", "bfloat16")
NOT_RUN = -1.0  # EngineInfo.relative_difference of an engine that could not be run where it was built


@dataclass(frozen=True)
class TensorRtOptions:
    """What is fixed when a bundle is built for TensorRT.

    Attributes:
        precision: of weights and activations of a float32 bundle; one exported in half precision keeps its own.
        cache: tokens of the longest text; the bundle's own limit by default.
        batch: sequences decoded together.
        prefill_rows: the most prompt tokens of one pass; longer prompts take several.
        source: tokens of the longest source of an encoder that reads text; shorter ones are padded and masked.
        audio_seconds: the longest recording of an encoder that hears any length: 30, or what it can where that is less.
        fits: a board of `devices`; the build stops before it begins where the engine would not fit it.
        builder: what the builder itself is told.
    """

    precision: str = "float16"
    cache: int | None = None
    batch: int = 1
    prefill_rows: int = 512
    source: int = 512
    audio_seconds: float | None = None
    fits: str | None = None
    builder: BuilderOptions = field(default_factory=BuilderOptions)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise OptionError(f"--precision {self.precision!r} is unknown. Choose one of: {', '.join(PRECISIONS)}.")
        if self.batch < 1:
            raise OptionError(f"--batch must be at least 1, got {self.batch}.")
        for name in ("prefill_rows", "source"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")

    def tokens(self, bundle: Bundle) -> int:
        """The longest text. Raises OptionError for one the model cannot read, or that is no text."""
        longest = bundle.manifest.model.max_cache
        tokens = self.cache or longest
        if tokens > longest:
            raise OptionError(f"--cache {tokens} is more than the {longest} tokens that {bundle.path} was exported for.")
        if tokens < LEAST_TOKENS:
            raise OptionError(f"--cache {tokens} is too small: at least {LEAST_TOKENS} tokens are needed.")
        return tokens

    def slots(self, bundle: Bundle) -> int:
        """Of the caches: the text, and behind it the rows of the largest verify pass, padding included."""
        return self.tokens(bundle) + MAX_ROWS

    def source_rows(self, bundle: Bundle) -> int:
        """Of the encoder's states. Raises OptionError for recordings longer than the model hears."""
        return source_rows(bundle, self.source, self.audio_seconds)


def build_tensorrt(bundle: Bundle, device: str, folder: Path, options: TensorRtOptions, progress: Progress) -> EngineInfo:
    """Lower and build every graph into `folder`.

    Raises OptionError for a target that cannot be built for, MissingExtraError without the library, EngineError for an int8
    cache, or when the library refuses a graph.
    """
    if options.fits is not None:
        from headstart.exporter.memory_plan import check_fits

        check_fits(bundle, options.fits, options)
    _check_caches(bundle)
    library = open_library(parse_target(device))
    settings = _settings(bundle, options)
    library.check_types(settings.values())
    made = _Building(bundle, library, folder, options, progress)
    made.decoder()
    if "encoder" in bundle.manifest.graphs:
        made.encoder()
    if "frontend" in bundle.manifest.graphs:
        made.frontend()
    for name in bundle.manifest.heads:
        made.head(name)
    packages = ("headstart", "onnx", "onnx-ir", "onnxscript")
    return EngineInfo(
        schema_version=ENGINE_SCHEMA,
        device=library.target.device,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        builder={library.module.__name__: library.version} | {name: importlib.metadata.version(name) for name in packages},
        source=engine_source(bundle),
        graphs={name: f"{name}.plan" for name in made.plans},
        settings=settings,
        passes=made.passes,
        relative_difference=NOT_RUN,
        plans=made.plans,
        cache_slots=options.slots(bundle),
        batch=options.batch,
        source_rows=made.sizes.get("source", 0),
        peak_memory_mb=peak_memory_mb(),
    )


def _check_caches(bundle: Bundle) -> None:
    """TensorRT's cache update takes floats only (found with TensorRT-RTX 1.7.1: its parser refuses TensorScatter on int8)."""
    if any(cache.dtype == "int8" for cache in bundle.manifest.caches):
        raise EngineError(
            f"{bundle.path} keeps its cache in int8, which TensorRT cannot update in place. "
            "Fix: headstart quantize without --kv-cache int8."
        )


def _settings(bundle: Bundle, options: TensorRtOptions) -> dict[str, str]:
    own = bundle.manifest.model.dtype
    chosen = {name: value for name, value in dataclasses.asdict(options.builder).items() if value not in (None, False)}
    return {
        "precision": options.precision if own == "float32" else own,
        "weights": bundle.manifest.quantization.get("weights", "as exported"),
    } | {name: str(value) for name, value in chosen.items() if name != "timing_cache"}


class _Building:
    """What has been built so far."""

    def __init__(self, bundle: Bundle, library: Library, folder: Path, options: TensorRtOptions, progress: Progress) -> None:
        self.bundle, self.library, self.folder = bundle, library, folder
        self.options, self.progress = options, progress
        self.sizes = {"batch": 1, "slots": options.slots(bundle)}
        if "encoder" in bundle.manifest.graphs:
            self.sizes["source"] = options.source_rows(bundle)
        self.plans: dict[str, PlanInfo] = {}
        self.passes: dict[str, int] = {}
        self.overflows = _overflows(bundle, options, progress)

    def decoder(self) -> None:
        rows = min(self.options.prefill_rows, self.options.tokens(self.bundle))
        self.passes = self._graph("decoder", self._canonical, decoder_profiles(rows, self.options.batch))

    def encoder(self) -> None:
        self._graph("encoder", self._canonical, encoder_profiles(self.bundle, self.options.audio_seconds))

    def frontend(self) -> None:
        self._graph("frontend", self._canonical, frontend_profiles(self.bundle, self.options.audio_seconds))

    def head(self, name: str) -> None:
        from headstart.exporter.heads.storage import load_head

        self._graph(f"heads/{name}", lambda _: load_head(self.bundle, name), head_profiles(self.options.batch))

    def _open_batch(self) -> dict[str, int]:
        """Where several sequences are decoded together: any number of them up to that, as the profiles say."""
        return {axis: size for axis, size in self.sizes.items() if axis != "batch"}

    def _canonical(self, name: str) -> Any:
        import onnx_ir as ir

        return ir.load(self.bundle.path / self.bundle.manifest.graphs[name].file)

    def _graph(self, name: str, load: Callable[[str], Any], profiles: tuple[Profile, ...]) -> dict[str, int]:
        """Lower, write for the parser, build, and leave only the plan; beside a stripped one the graph that has its weights."""
        file = self.folder / f"{name}.onnx"
        self.progress(f"lowering {name}")
        lowered = self._lower(name, load(name), file)
        gc.collect()  # a graph's nodes and values know each other: without this its weights stay through the build
        info = build_plan(
            file,
            lowered.axes,
            profiles,
            self.library,
            self.options.builder,
            lambda stage: self.progress(f"building {name}: {stage}"),
            lambda node: source_module(file, node),
        )
        if not self.options.builder.strip_weights:
            file.unlink()
            file.with_name(f"{file.name}.data").unlink(missing_ok=True)
        self.plans[name] = dataclasses.replace(
            info, float32_layers=lowered.float32_layers, decomposed_attention=lowered.decomposed_attention
        )
        return lowered.passes

    def _lower(self, name: str, model: Any, file: Path) -> "_Written":
        """Write the lowered graph. Nothing of it stays in memory."""
        from headstart.exporter.graph import save_graph
        from headstart.exporter.lowering.tensorrt import lower, lower_frontend

        if name == "frontend":
            lowered = lower_frontend(model, self.sizes, self.library.native)
        else:
            sizes = self.sizes if self.options.batch == 1 or name == "encoder" else self._open_batch()
            lowered = lower(model, self.options.precision, sizes, self.library.native, self.overflows.get(name, ()))
        save_graph(lowered.model, file)
        inputs = lowered.model.graph.inputs
        axes = {v.name: [a if isinstance(a, int) else str(a.value) for a in v.shape] for v in inputs}
        return _Written(axes, lowered.passes, lowered.float32_layers, lowered.decomposed_attention)


@dataclass(frozen=True)
class _Written:
    """What is known of a lowered graph once it is on disk: each input's axes, what the passes did, special layers."""

    axes: dict[str, list[str | int]]
    passes: dict[str, int]
    float32_layers: tuple[str, ...]
    decomposed_attention: tuple[str, ...]


def _overflows(bundle: Bundle, options: TensorRtOptions, progress: Progress) -> dict[str, tuple[str, ...]]:
    """What float16 cannot hold: as the bundle says, or else found now. Raises MissingExtraError where it cannot be found."""
    manifest = bundle.manifest
    if manifest.overflows or manifest.model.dtype != "float32" or options.precision != "float16":
        return manifest.overflows
    from headstart.exporter.overflow import overflowing

    progress("looking for values beyond float16's range")
    return overflowing(bundle.path, manifest)


def source_module(file: Path, node_name: str) -> str:
    """The checkpoint's module that a node of a graph belongs to, told by the nearest weight, and its layer."""
    import onnx_ir as ir

    nodes = list(ir.load(file).graph)
    place = next((i for i, node in enumerate(nodes) if node.name == node_name), None)
    if place is None:
        return "an unknown module"
    for node in (*nodes[place::-1], *nodes[place + 1 :]):
        for value in node.inputs:
            if value is not None and value.is_initializer() and (found := re.match(r"(.+?)\.(weight|bias)\b", value.name)):
                layer = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", found.group(1))
                return f"{found.group(1)} or just behind it" + (f" (layer {layer.group(1)})" if layer else "")
    return "an unknown module"

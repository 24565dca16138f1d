"""`engines/<device>/engine.json`: what a built engine holds, what it was built from, and whether it still fits.

Schema: the frozen dataclass below, one JSON object.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from headstart.runtime.bundle import Bundle
from headstart.runtime.documents import from_json
from headstart.runtime.errors import BundleError, EngineError
from headstart.runtime.output import check_files
from headstart.runtime.precision import Difference, FloatAgreement

ENGINE_FILE = "engine.json"
ENGINE_SCHEMA = 5
LM_HEAD = "lm_head"  # in `EngineInfo.graphs`, where the decoder's graph ends with its hidden states


@dataclass(frozen=True)
class Profile:
    """One optimization profile of a plan: the least, usual and most of each open axis ("rows", "chosen", …)."""

    name: str
    sizes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PlanInfo:
    """One TensorRT plan.

    Attributes:
        bytes: of the file.
        build_s: seconds the builder took.
        profiles: in the plan's own order.
        layers: layers of the parsed network by kind and type, e.g. "matrix_multiply float16"; strongly typed, so these
            types are the engine's.
        kernels: steps of the compiled plan by kind, over all profiles; empty where the plan does not tell.
        weight_bytes: constants of the compiled plan by type; empty where the plan does not tell.
        in_place: caches that the compiled plan reads and writes in one buffer.
        float32_layers: the checkpoint's names of the linear layers that compute in float32, their numbers being too large for
            float16.
        decomposed_attention: the attention layers that are decomposed into products and a softmax, because TensorRT has no
            attention layer that computes them: "self-attention 0".
    """

    bytes: int
    build_s: float
    profiles: tuple[Profile, ...]
    layers: dict[str, int]
    kernels: dict[str, int] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    in_place: tuple[str, ...] = ()
    float32_layers: tuple[str, ...] = ()
    decomposed_attention: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineInfo:
    """A bundle's graphs made ready for one device.

    Attributes:
        schema_version: of this file.
        device: as given to `headstart build`.
        created: ISO 8601, UTC.
        builder: package versions that built it.
        source: sha256 of each of the bundle's files it was built from.
        graphs: "decoder" (one sequence), "decoder_batch" (any batch), "lm_head" (where the decoder has none), "encoder",
            "frontend", "heads/<name>", "probe" -> file in this one's folder.
        settings: what was chosen for this device, e.g. the type of integer activations.
        passes: what each lowering pass did, in order.
        relative_difference: largest |Δlogit| against the canonical graph on the golden inputs, over the logits' range;
            None where the engine was not run, because the building machine cannot.
        differences: of every graph that was run, its outputs' difference from the canonical graph's.
        float_agreement: of a quantized bundle's engine with the float model; None for others, and where it was not run.
        plans: name of a graph -> what was built of it, for TensorRT.
        cache_slots: of the caches, where that is fixed at build: the longest text and a verify pass after it; else 0.
        batch: sequences decoded together, where that is fixed at build; else 0.
        source_rows: of the encoder's states, where there is an encoder and that is fixed at build; else 0.
        peak_memory_mb: of the building process, where it was measured; else 0.
        files: sha256 of each file in this folder.
    """

    schema_version: int
    device: str
    created: str
    builder: dict[str, str]
    source: dict[str, str]
    graphs: dict[str, str]
    settings: dict[str, str]
    passes: dict[str, int] = field(default_factory=dict)
    relative_difference: float | None = None
    differences: dict[str, Difference] = field(default_factory=dict)
    float_agreement: FloatAgreement | None = None
    plans: dict[str, PlanInfo] = field(default_factory=dict)
    cache_slots: int = 0
    batch: int = 0
    source_rows: int = 0
    peak_memory_mb: float = 0.0
    files: dict[str, str] = field(default_factory=dict)

    def replaced(self) -> set[str]:
        """The bundle's files that nobody reads once this engine is there: the canonical graphs."""
        return {name for name in self.source if not name.endswith(".json")}


def engine_folder(bundle: Bundle, device: str) -> Path:
    """`engines/<device>`; colons and commas, as in trt-rtx:sm86,sm89, become hyphens."""
    return bundle.path / "engines" / device.replace(":", "-").replace(",", "-")


def built_engine(bundle: Bundle, device: str) -> EngineInfo | None:
    """What was built for `device`, its files' hashes checked; None when nothing was.

    Raises EngineError when it was built from other graphs than the bundle now holds, or by another version of Headstart;
    BundleError when a file of it is missing or was edited.
    """
    file = engine_folder(bundle, device) / ENGINE_FILE
    if not file.is_file():
        return None
    fix = f"Fix: headstart build {bundle.path} --device {device} --force."
    try:
        version = json.loads(file.read_text("utf-8"))["schema_version"]
        if version != ENGINE_SCHEMA:
            raise EngineError(f"{file} has schema version {version}, this Headstart reads {ENGINE_SCHEMA}. {fix}")
        info = from_json(EngineInfo, file.read_text("utf-8"), str(file))
    except (ValueError, KeyError, TypeError, BundleError) as error:
        raise EngineError(f"{file} is no valid engine description ({error}). {fix}") from error
    if info.device != device:
        raise EngineError(f"{file.parent} was built for the device {info.device}, not {device}. {fix}")
    now = engine_source(bundle)
    changed = sorted(name for name in info.source.keys() | now.keys() if info.source.get(name) != now.get(name))
    if changed:
        raise EngineError(f"{file.parent} was built from another {changed[0]} than the bundle now holds. {fix}")
    check_files(file.parent, info.files, ENGINE_FILE, fix.removeprefix("Fix: ").removesuffix("."))
    return info


def engine_source(bundle: Bundle) -> dict[str, str]:
    """sha256 of every file an engine is made of: the graphs and heads, with their weights."""
    return {name: digest for name, digest in bundle.manifest.files.items() if name.startswith(("graphs/", "heads/"))}

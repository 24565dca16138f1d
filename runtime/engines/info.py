"""`engines/<device>/engine.json`: what a built engine holds, what it was built from, and whether it still fits.

Schema: the frozen dataclass below, one JSON object.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from headstart.runtime.bundle import Bundle, from_json
from headstart.runtime.errors import BundleError, EngineError

ENGINE_FILE = "engine.json"
ENGINE_SCHEMA = 1


@dataclass(frozen=True)
class EngineInfo:
    """A bundle's graphs made ready for one device.

    Attributes:
        schema_version: of this file.
        device: as given to `headstart build`.
        created: ISO 8601, UTC.
        builder: package versions that built it.
        source: sha256 of each of the bundle's files it was built from.
        graphs: "decoder" (one sequence), "decoder_batch" (any batch), "encoder", "heads/<name>", "probe" -> file beside
            this one.
        settings: what was chosen for this device, e.g. the type of integer activations.
        passes: what each lowering pass did, in order.
        relative_difference: largest |Δlogit| against the canonical graph on the golden inputs, over the logits' range.
    """

    schema_version: int
    device: str
    created: str
    builder: dict[str, str]
    source: dict[str, str]
    graphs: dict[str, str]
    settings: dict[str, str]
    passes: dict[str, int] = field(default_factory=dict)
    relative_difference: float = 0.0


def engine_folder(bundle: Bundle, device: str) -> Path:
    """`engines/<device>`; a colon, as in trt-rtx:sm89, becomes a hyphen."""
    return bundle.path / "engines" / device.replace(":", "-")


def built_engine(bundle: Bundle, device: str) -> EngineInfo | None:
    """What was built for `device`; None when nothing was.

    Raises EngineError when it was built from other graphs than the bundle now holds, or by another version of Headstart.
    """
    file = engine_folder(bundle, device) / ENGINE_FILE
    if not file.is_file():
        return None
    fix = f"Fix: headstart build {bundle.path} --device {device} --force."
    try:
        version = json.loads(file.read_text("utf-8"))["schema_version"]
        if version != ENGINE_SCHEMA:
            raise EngineError(f"{file} has schema version {version}, this Headstart reads {ENGINE_SCHEMA}. {fix}")
        info = from_json(EngineInfo, file.read_text("utf-8"))
    except (ValueError, KeyError, TypeError, BundleError) as error:
        raise EngineError(f"{file} is no valid engine description ({error}). {fix}") from error
    if info.device != device:
        raise EngineError(f"{file.parent} was built for the device {info.device}, not {device}. {fix}")
    now = engine_source(bundle)
    changed = sorted(name for name in info.source.keys() | now.keys() if info.source.get(name) != now.get(name))
    if changed:
        raise EngineError(f"{file.parent} was built from another {changed[0]} than the bundle now holds. {fix}")
    return info


def engine_source(bundle: Bundle) -> dict[str, str]:
    """sha256 of every file an engine is made of: the graphs and heads, with their weights."""
    return {name: digest for name, digest in bundle.manifest.files.items() if name.startswith(("graphs/", "heads/"))}

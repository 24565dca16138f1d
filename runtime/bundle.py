"""The bundle: one folder that holds everything decoding needs, explained by `manifest.json`.

Knows the manifest's schema and which files are hashed. Knows nothing of graphs' contents or of engines.
Schema: frozen dataclasses below, one JSON object each.
"""

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .documents import from_document, parse_json, to_json
from .errors import BundleError
from .output import atomic_write, check_files, hash_files, interrupted

SCHEMA_VERSION = 2  # 1 kept the decoder's caches apart from its graph
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"  # what the checkpoint itself says on a few inputs


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a graph. Symbolic sizes are strings."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class KeyValueInfo:
    """The keys and values of one attention layer: slots of the graph's own, or what it reads of the source.

    Both tensors are [B, kv_heads, slots or source rows, key_size or value_size].
    """

    key_name: str
    value_name: str
    kv_heads: int
    key_size: int
    value_size: int
    dtype: str

    def sizes(self) -> dict[str, int]:
        """Tensor name -> size of its last axis, the key first."""
        return {self.key_name: self.key_size, self.value_name: self.value_size}


@dataclass(frozen=True)
class RecurrentInfo:
    """A recurrent state: [B, *shape] before the first row goes in, [B, T, *shape] comes out, one after each row.

    The output is called `contract.updated(name)`. A sequence without tokens has a state of zeros.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


StateInfo = KeyValueInfo | RecurrentInfo


@dataclass(frozen=True)
class GraphInfo:
    """One ONNX file, its path relative to the bundle, with all that it reads, returns and keeps.

    Attributes:
        inputs, outputs: all of them, the states' and the sources' tensors included.
        slots: key/value slots that it keeps from run to run, updated in place.
        recurrent: states that it returns one per row.
        reads: cross-attention keys and values, which the encoder's graph returns.
    """

    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    slots: tuple[KeyValueInfo, ...] = ()
    recurrent: tuple[RecurrentInfo, ...] = ()
    reads: tuple[KeyValueInfo, ...] = ()

    @property
    def states(self) -> tuple[StateInfo, ...]:
        """What it keeps from run to run; empty for a graph without memory."""
        return (*self.slots, *self.recurrent)


@dataclass(frozen=True)
class WeightInfo:
    """Where one tensor lies inside a data file, so that another graph can use the same bytes.

    Attributes:
        rotation: of a linear layer's weight: the block of the rotation that its inputs go through; 0 for none.
    """

    file: str
    offset: int  # bytes
    dtype: str
    shape: tuple[int, ...]
    rotation: int = 0


@dataclass(frozen=True)
class ModelInfo:
    """What the target model is.

    Attributes:
        aux_layers: indices into `hidden_states` in the transformers convention.
        source: what the encoder reads: "text", "audio", or "" without an encoder; "states" for an assistant, which has no
            encoder of its own and reads the states of its target's.
        max_source: the longest source in tokens, or in frames or samples of audio; 0 is no limit.
        encoder_sha256: of the checkpoint's encoder, by which a target and its assistants know one another.
    """

    architecture: str
    family: str  # "decoder" or "encoder-decoder"
    dtype: str
    vocab_size: int
    hidden_size: int
    layers: int
    max_cache: int  # tokens
    parameters: int
    aux_layers: tuple[int, ...] = ()
    source: str = ""
    max_source: int = 0
    encoder_sha256: str = ""


@dataclass(frozen=True)
class AudioInfo:
    """How recordings are fed to the model.

    Attributes:
        sampling_rate: Hz.
        window: samples of one window, to which shorter recordings are filled up with silence; None takes any length.
        hop: samples between two of the front-end's frames; None where the encoder reads the samples themselves.
    """

    sampling_rate: int
    window: int | None = None
    hop: int | None = None


@dataclass(frozen=True)
class GenerationRules:
    """What the checkpoint's generation_config says; names and meanings are those of transformers.

    Lengths count the decoder's tokens, its first included. The last block is Whisper's: tokens by language ("<|en|>") and
    task ("transcribe"), what its timestamps need, and (layer, head) of the cross-attention heads that tell words' times.
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    begin_suppress_tokens: tuple[int, ...] = ()
    min_length: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    renormalize_logits: bool = False
    lang_to_id: dict[str, int] = field(default_factory=dict)
    task_to_id: dict[str, int] = field(default_factory=dict)
    no_timestamps_token_id: int | None = None
    max_initial_timestamp_index: int | None = None
    prev_sot_token_id: int | None = None
    alignment_heads: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Provenance:
    """Where the bundle came from: command, source, package versions, hashes of the source's weight files.

    Attributes:
        notes: what the export has to say about the bundle, one sentence each: settings that are not applied, say.
    """

    command: str
    source: str
    created: str  # ISO 8601, UTC
    versions: dict[str, str]
    source_sha256: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeadInfo:
    """A draft head: `heads/<name>/head.json`.

    Attributes:
        family: a row of the table of families, "medusa".
        dialect: the published format it was imported from.
        heads: future tokens proposed, one head each, or the depth of the tree that its graph drafts.
        top_k: candidates per head.
        shared: initializers of its graph that lie in the target's data file.
        embeddings: where the target's embeddings lie, for a head whose graph takes that of the root.
    """

    name: str
    family: str
    dialect: str
    hidden_size: int
    vocab_size: int
    heads: int
    top_k: int
    graph: GraphInfo
    shared: dict[str, WeightInfo] = field(default_factory=dict)
    embeddings: dict[str, WeightInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`."""

    schema_version: int
    model: ModelInfo
    graphs: dict[str, GraphInfo]
    generation: GenerationRules
    provenance: Provenance
    audio: AudioInfo | None = None  # of models that read recordings
    heads: tuple[str, ...] = ()  # draft heads, whose graphs are described in their own head.json
    weights: dict[str, WeightInfo] = field(default_factory=dict)
    quantization: dict[str, str] = field(default_factory=dict)
    # graph -> values that left float16's range on the golden inputs; a graph that is not named was not looked at
    overflows: dict[str, tuple[str, ...]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # path relative to the bundle -> sha256


class Bundle:
    """A bundle on disk, its manifest read and (by default) every file's hash checked."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def load(cls, path: str | Path, check_hashes: bool = True) -> "Bundle":
        """Raises BundleError when the folder is no bundle, of another schema, or has a missing or edited file."""
        path = Path(path)
        bundle = cls(path, read_manifest(path))
        if check_hashes:
            bundle.check_hashes()
        return bundle

    def check_hashes(self, unread: Collection[str] = ()) -> None:
        """Hash every file but those in `unread`. Raises BundleError for one that is missing or was edited."""
        wanted = {name: digest for name, digest in self.manifest.files.items() if name not in unread}
        check_files(self.path, wanted, "the manifest", "export or copy the bundle again")

    def head(self, name: str) -> HeadInfo:
        """The description of one draft head. Raises BundleError when there is none of that name."""
        if name not in self.manifest.heads:
            known = ", ".join(self.manifest.heads) or "none"
            raise BundleError(f"{self.path} has no draft head {name!r}. It has: {known}.")
        file = self.path / "heads" / name / "head.json"
        document = parse_json(file.read_text("utf-8"), str(file))
        if isinstance(document, dict):
            document.pop("lossless", None)  # older bundles have it, and nothing reads it
        return from_document(HeadInfo, document, str(file))

    @property
    def graphs(self) -> dict[str, GraphInfo]:
        """Every graph by the name that `Engine.graph` takes: the target's own, then `heads/<name>` of each draft head."""
        return self.manifest.graphs | {f"heads/{name}": self.head(name).graph for name in self.manifest.heads}


def read_document(path: Path) -> dict[str, Any]:
    """`manifest.json` as it is, of any schema. Raises BundleError when the folder has none."""
    file = path / MANIFEST
    if not file.is_file():
        old = interrupted(path)
        fix = f"mv {old} {path}, the bundle that was being replaced" if old else f"headstart export CHECKPOINT -o {path}"
        raise BundleError(f"{path} is not a bundle: it holds no {MANIFEST}. Fix: {fix}.")
    try:
        document: dict[str, Any] = json.loads(file.read_text("utf-8"))
        int(document["schema_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{file} is no valid manifest ({error}). Fix: export or copy the bundle again.") from error
    return document


def read_manifest(path: Path) -> Manifest:
    """Raises BundleError when the folder has no manifest that this version can read."""
    document, file = read_document(path), path / MANIFEST
    version = document["schema_version"]
    if version != SCHEMA_VERSION:
        older = version < SCHEMA_VERSION
        fix = f"headstart upgrade {path}, or export again" if older else "a newer Headstart, or export again with this one"
        raise BundleError(
            f"{file} has schema version {version}, which {'an older' if older else 'a newer'} Headstart wrote; "
            f"this one reads {SCHEMA_VERSION}. Fix: {fix}."
        )
    return from_document(Manifest, document, str(file))


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Hash every file of the bundle and write `manifest.json` by rename."""
    files = hash_files(path, _is_hashed)
    atomic_write(path / MANIFEST, to_json(dataclasses.replace(manifest, files=files)))


def _is_hashed(relative: Path) -> bool:
    """Not the manifest, complete or partial; nor engines and tunings, which are rebuilt freely and carry fingerprints."""
    first = relative.parts[0]
    return first not in ("engines", "tuning", MANIFEST) and not first.startswith(f".{MANIFEST}.partial")

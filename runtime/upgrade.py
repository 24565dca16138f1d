"""Bundles of older schemas, converted to the current one: `upgraded` for the document, `upgrade` for the folder."""

import copy
import json
from pathlib import Path
from typing import Any

from .bundle import MANIFEST, SCHEMA_VERSION, Bundle, Manifest, read_document
from .documents import from_document
from .engines.info import ENGINE_FILE, ENGINE_SCHEMA
from .errors import BundleError
from .output import atomic_write, check_files
from .tuning import TUNING_SCHEMA


def upgrade(path: str | Path) -> Bundle:
    """Convert a bundle in place; a bundle of the current schema stays as it is.

    Only the manifest changes, by one rename, so that the bundle is whole at any moment. The hashes of all other files are
    checked first and stay. Engines and tunings of older schemas are not converted: see `outdated`.

    Raises BundleError when the folder is no bundle, has a missing or edited file, or has a schema that cannot be converted.
    """
    path = Path(path)
    document = read_document(path)
    if document["schema_version"] != SCHEMA_VERSION:
        try:
            document = upgraded(document)
        except (AttributeError, KeyError, TypeError) as error:
            raise BundleError(f"{path / MANIFEST} is not a valid manifest ({error!r}). Fix: export again.") from error
        manifest = from_document(Manifest, document, str(path / MANIFEST))
        check_files(path, manifest.files, "the manifest", "export or copy the bundle again")
        atomic_write(path / MANIFEST, json.dumps(document, indent=2) + "\n")
    return Bundle.load(path)


def outdated(bundle: Bundle) -> list[str]:
    """The commands that rebuild the bundle's engines and tunings of older schemas."""
    engines = _of_other_schemas(bundle.path / "engines", f"*/{ENGINE_FILE}", ENGINE_SCHEMA)
    tunings = _of_other_schemas(bundle.path / "tuning", "*.json", TUNING_SCHEMA)
    build = [f"headstart build {bundle.path} --device {device} --force" for device in engines]
    return build + [f"headstart tune {bundle.path} --device {device} --data FILE --force" for device in tunings]


def _of_other_schemas(folder: Path, pattern: str, schema: int) -> list[str]:
    """The devices of the documents that have another schema."""
    documents = [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob(pattern))]
    return [str(document["device"]) for document in documents if document["schema_version"] != schema]


def upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """`manifest.json` of schema 1, as schema 2 has it: the decoder's caches and sources move into its graph.

    Heads' own descriptions (head.json) are the same in both. Raises BundleError for a document of any other schema.
    """
    version = document.get("schema_version")
    if version != 1:
        raise BundleError(f"The manifest has schema version {version!r}; only 1 can be upgraded to {SCHEMA_VERSION}.")
    new = copy.deepcopy(document)
    dtype = new["model"]["dtype"]
    slots, reads = (_with_dtype(new.pop(name, []), dtype) for name in ("caches", "cross_caches"))
    for name, graph in new["graphs"].items():
        own = {"slots": slots, "reads": reads} if name == "decoder" else {"slots": [], "reads": []}
        graph.update(slots=own["slots"], recurrent=[], reads=own["reads"])
    new["schema_version"] = 2
    return new


def _with_dtype(pairs: list[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """Schema 1 leaves the type out where it is the model's own."""
    return [pair | {"dtype": pair.get("dtype") or dtype} for pair in pairs]

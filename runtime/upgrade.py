"""Manifests of older schemas, brought to the present one. Pure functions of documents; callers write the files."""

import copy
from typing import Any

from .bundle import SCHEMA_VERSION
from .errors import BundleError


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

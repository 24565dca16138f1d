"""Manifests of schema 1: refused with the two ways out, and upgraded to what an export writes today."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headstart.runtime.bundle import Bundle, GraphInfo, KeyValueInfo, Manifest, read_manifest
from headstart.runtime.documents import from_json
from headstart.runtime.errors import BundleError
from headstart.runtime.upgrade import upgraded

SCHEMA_1 = Path(__file__).with_name("manifest_schema_1.json")  # of a T5, as an export wrote it


@pytest.fixture
def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SCHEMA_1.read_text("utf-8"))
    return found


def test_schema_1_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(SCHEMA_1.read_text("utf-8"), "utf-8")
    with pytest.raises(BundleError, match=r"schema version 1, .* this one reads 2\. Fix: headstart upgrade .*, or export"):
        read_manifest(tmp_path)


def test_the_upgraded_manifest_is_what_an_export_writes(document: dict[str, Any], bundle_of: Callable[[str], Bundle]) -> None:
    manifest = from_json(Manifest, json.dumps(upgraded(document)))
    today = bundle_of("t5").manifest
    assert manifest.schema_version == today.schema_version == 2
    for name in ("decoder", "encoder"):
        assert isinstance(manifest.graphs[name], GraphInfo) and manifest.graphs[name] == today.graphs[name]
    assert manifest.model == today.model and manifest.generation == today.generation


def test_a_type_that_is_stated_stays(document: dict[str, Any]) -> None:
    document["caches"][1]["dtype"] = "int8"
    slots = from_json(Manifest, json.dumps(upgraded(document))).graphs["decoder"].slots
    assert slots[1] == KeyValueInfo("key_cache.1", "value_cache.1", 4, 16, 16, "int8") and slots[0].dtype == "float32"


def test_upgrading_changes_nothing_of_what_it_is_given(document: dict[str, Any]) -> None:
    before = json.dumps(document)
    upgraded(document)
    assert json.dumps(document) == before


@pytest.mark.parametrize("version", [0, 2, None])
def test_other_schemas_are_refused(document: dict[str, Any], version: int | None) -> None:
    with pytest.raises(BundleError, match=rf"schema version {version}; only 1 can be upgraded to 2"):
        upgraded(document | {"schema_version": version})

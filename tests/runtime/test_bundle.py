"""The bundle's JSON and its hashes."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from headstart.runtime.bundle import (
    Bundle,
    GenerationRules,
    GraphInfo,
    HeadInfo,
    Manifest,
    ModelInfo,
    Provenance,
    TensorInfo,
    WeightInfo,
    write_manifest,
)
from headstart.runtime.documents import from_json, to_json
from headstart.runtime.errors import BundleError

GRAPH = GraphInfo("graphs/decoder.onnx", (TensorInfo("input_ids", "int64", ("batch", "rows")),), ())
MANIFEST = Manifest(
    schema_version=2,
    model=ModelInfo("LlamaForCausalLM", "decoder", "float32", 300, 64, 2, 256, 1234, (1, 2)),
    graphs={"decoder": GRAPH},
    generation=GenerationRules((2,), None, ()),
    provenance=Provenance("headstart export", "tiny", "2026-01-01T00:00:00+00:00", {"torch": "2"}, {}),
    weights={"lm_head": WeightInfo("graphs/decoder.onnx.data", 64, "float32", (300, 64))},
)


def small_bundle(folder: Path) -> Path:
    (folder / "graphs").mkdir(parents=True)
    (folder / "graphs/decoder.onnx").write_bytes(b"graph")
    write_manifest(folder, MANIFEST)
    return folder


def test_json_round_trip() -> None:
    assert from_json(Manifest, to_json(MANIFEST)) == MANIFEST


def test_head_json_is_pinned() -> None:
    head = HeadInfo("medusa", "medusa", "medusa-1", 64, 300, 4, 10, GRAPH, {"lm_head": MANIFEST.weights["lm_head"]})
    document = json.loads(to_json(head))
    assert list(document) == [
        "name", "family", "dialect", "hidden_size", "vocab_size", "heads", "top_k", "graph", "shared", "embeddings",
    ]  # fmt: skip
    assert document["shared"]["lm_head"] == {
        "file": "graphs/decoder.onnx.data", "offset": 64, "dtype": "float32", "shape": [300, 64],
        "rotation": 0,
    }  # fmt: skip
    assert from_json(HeadInfo, to_json(head)) == head


def test_head_json_of_an_older_bundle_is_read(tmp_path: Path) -> None:
    head = HeadInfo("medusa", "medusa", "medusa-1", 64, 300, 4, 10, GRAPH)
    folder = small_bundle(tmp_path / "b")
    (folder / "heads/medusa").mkdir(parents=True)
    (folder / "heads/medusa/head.json").write_text(json.dumps(json.loads(to_json(head)) | {"lossless": True}))
    write_manifest(folder, dataclasses.replace(MANIFEST, heads=("medusa",)))
    assert Bundle.load(folder).head("medusa") == head


def test_load_and_hashes(tmp_path: Path) -> None:
    folder = small_bundle(tmp_path / "b")
    manifest = Bundle.load(folder).manifest
    assert dataclasses.replace(manifest, files={}) == MANIFEST
    assert set(manifest.files) == {"graphs/decoder.onnx"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: (f / "graphs/decoder.onnx").write_bytes(b"grapf"), "was changed"),
        (lambda f: (f / "graphs/decoder.onnx").unlink(), "is missing"),
        (lambda f: (f / "manifest.json").unlink(), "is not a bundle"),
        (lambda f: (f / "manifest.json").write_text("{"), "no valid manifest"),
        (lambda f: (f / "manifest.json").write_text('{"schema_version": 99}'), "schema version 99"),
        (lambda f: (f / "manifest.json").write_text('{"schema_version": 2}'), "missing keys"),
        (lambda f: (f / "manifest.json").write_text('{"schema_version": 1}'), "Fix: headstart upgrade"),
    ],
)
def test_damaged_bundles_are_named(tmp_path: Path, edit: Callable[[Path], None], message: str) -> None:
    folder = small_bundle(tmp_path / "b")
    edit(folder)
    with pytest.raises(BundleError, match=message):
        Bundle.load(folder)


def test_wrong_type_in_manifest(tmp_path: Path) -> None:
    folder = small_bundle(tmp_path / "b")
    text = (folder / "manifest.json").read_text().replace('"max_cache": 256', '"max_cache": "256"')
    (folder / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match="max_cache"):
        Bundle.load(folder)


def test_unknown_head(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    with pytest.raises(BundleError, match="no draft head 'x'"):
        Bundle.load(small_bundle(tmp_path)).head("x")

"""The bundle's JSON, its hashes, and writing that leaves nothing behind."""

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
    from_json,
    new_folder,
    to_json,
    write_manifest,
)
from headstart.runtime.errors import BundleError, OutputError

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
        "name", "family", "dialect", "hidden_size", "vocab_size", "heads", "top_k", "graph", "shared", "lossless",
    ]  # fmt: skip
    assert document["shared"]["lm_head"] == {
        "file": "graphs/decoder.onnx.data", "offset": 64, "dtype": "float32", "shape": [300, 64],
    }  # fmt: skip
    assert from_json(HeadInfo, to_json(head)) == head


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


def test_new_folder_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as partial:
        (partial / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as partial:
        (partial / "whole").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_new_folder_refuses_an_existing_one_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("x")
    with pytest.raises(OutputError, match="--force"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out/old").exists()
    with new_folder(tmp_path / "out", force=True) as partial:
        (partial / "new").write_text("x")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


def test_unwritable_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"), new_folder(tmp_path / "file" / "out"):
        pass


def test_unknown_head(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    with pytest.raises(BundleError, match="no draft head 'x'"):
        Bundle.load(small_bundle(tmp_path)).head("x")

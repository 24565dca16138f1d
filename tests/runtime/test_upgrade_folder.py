"""`headstart upgrade`: an older bundle is converted in place, whole at any moment, and says what must be built again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from headstart.cli import app
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import BundleError
from headstart.runtime.output import hash_files
from headstart.runtime.upgrade import outdated, upgrade

from .test_output import killed_at

BundleOf = Callable[[str], Bundle]


def downgraded(document: dict[str, Any]) -> dict[str, Any]:
    """As schema 1 wrote the same bundle: caches apart from the graphs, and no type where it is the model's own."""
    old = json.loads(json.dumps(document))
    old["schema_version"] = 1
    decoder = old["graphs"]["decoder"]
    for name, field in (("caches", "slots"), ("cross_caches", "reads")):
        old[name] = [pair | {"dtype": None} for pair in decoder[field]]
    for graph in old["graphs"].values():
        for field in ("slots", "recurrent", "reads"):
            del graph[field]
    return old


@pytest.fixture
def old(bundle_of: BundleOf, tmp_path: Path) -> Path:
    folder = shutil.copytree(bundle_of("t5").path, tmp_path / "bundle")
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(downgraded(json.loads(manifest.read_text()))))
    return folder


def test_the_manifest_changes_and_nothing_else(old: Path, bundle_of: BundleOf) -> None:
    with pytest.raises(BundleError, match=r"schema version 1, which an older Headstart wrote; .* headstart upgrade"):
        Bundle.load(old)
    before = hash_files(old, lambda relative: relative.name != "manifest.json")
    assert upgrade(old).manifest == bundle_of("t5").manifest
    assert hash_files(old, lambda relative: relative.name != "manifest.json") == before
    written = (old / "manifest.json").stat()
    assert upgrade(old).manifest == Bundle.load(old).manifest  # a second time: nothing to do
    assert (old / "manifest.json").stat() == written


def test_a_kill_at_any_step_leaves_one_of_both_manifests(old: Path) -> None:
    text, step, schemas = (old / "manifest.json").read_text(), 0, []
    while True:
        (old / "manifest.json").write_text(text)
        killed = killed_at(step, lambda: upgrade(old))
        schemas.append(json.loads((old / "manifest.json").read_text())["schema_version"])
        if not killed:
            break
        step += 1
    assert schemas == sorted(schemas) and set(schemas) == {1, 2}
    upgrade(old)
    assert not [file for file in old.iterdir() if file.name.startswith(".")]


def test_an_edited_bundle_is_not_upgraded(old: Path) -> None:
    (old / "tokenizer/tokenizer.json").write_text("{}")
    text = (old / "manifest.json").read_text()
    with pytest.raises(BundleError, match=r"tokenizer\.json was changed after it was written"):
        upgrade(old)
    assert (old / "manifest.json").read_text() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "99; only 1 can be upgraded"),
        ({"model": {}}, r"not a valid manifest \(KeyError\('dtype'\)\)"),
        ({"model": {"dtype": "float32"}}, r"missing keys: 'architecture' @ .*manifest\.json\.model"),
        ({"surplus": 1}, r"unknown keys: 'surplus' @ .*manifest\.json"),
    ],
)
def test_other_documents_are_refused(old: Path, change: dict[str, Any], message: str) -> None:
    document = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps(document | change))
    with pytest.raises(BundleError, match=message):
        upgrade(old)


def test_newer_bundles_want_a_newer_headstart(old: Path) -> None:
    document = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps(document | {"schema_version": 99}))
    with pytest.raises(BundleError, match=r"schema version 99, which a newer Headstart wrote; .* Fix: a newer Headstart"):
        Bundle.load(old)


def test_engines_and_tunings_of_older_schemas_are_named(old: Path) -> None:
    for file, document in (
        ("engines/cpu/engine.json", {"schema_version": 3, "device": "cpu"}),
        ("engines/trt-rtx-sm89/engine.json", {"schema_version": 3, "device": "trt-rtx:sm89"}),
        ("tuning/cpu.json", {"schema_version": 1, "device": "cpu"}),
    ):
        (old / file).parent.mkdir(parents=True, exist_ok=True)
        (old / file).write_text(json.dumps(document))
    done = CliRunner().invoke(app, ["upgrade", str(old)])
    assert done.exit_code == 0
    assert done.output.splitlines() == [
        f"{old}: schema 2",
        f"to be done again: headstart build {old} --device cpu --force",
        f"to be done again: headstart build {old} --device trt-rtx:sm89 --force",
        f"to be done again: headstart tune {old} --device cpu --data FILE --force",
    ]


def test_nothing_is_outdated_in_a_new_bundle(bundle_of: BundleOf) -> None:
    assert outdated(bundle_of("t5")) == []

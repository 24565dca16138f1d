"""What may be replaced, and that a kill at any step, or another process, leaves the old or the new folder whole."""

import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headstart.runtime import output
from headstart.runtime.bundle import Bundle, write_manifest
from headstart.runtime.errors import BundleError, OutputError
from headstart.runtime.output import atomic_write, check_files, edited_folder, hash_files, new_folder, scratch_folder

from .test_bundle import MANIFEST

GRAPH = "graphs/decoder.onnx"
STEPS = {"open", "tempfile.mkdtemp", "tempfile.mkstemp"} | {
    f"os.{name}" for name in ("chmod", "link", "mkdir", "remove", "rename", "rmdir")
}


def write_bundle(folder: Path, content: str) -> None:
    """Several files, so that a deletion which was interrupted half-way shows."""
    for name in (GRAPH, "graphs/decoder.onnx.data", "tokenizer/tokenizer.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    write_manifest(folder, MANIFEST)


def make_bundle(folder: Path, content: str = "old") -> Path:
    folder.mkdir(parents=True)
    write_bundle(folder, content)
    return folder


def content_of(bundle: Path) -> str:
    """Raises BundleError when a file is missing or was changed."""
    Bundle.load(bundle)
    return (bundle / GRAPH).read_text()


def replace(target: Path, content: str = "new") -> None:
    with new_folder(target, force=True) as folder:
        write_bundle(folder, content)


def test_new_folder_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as partial:
        (partial / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as partial:
        (partial / "whole").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_parent_folders_made_for_nothing_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "mine" / "engines" / "cpu"
    target.parent.parent.mkdir()
    with pytest.raises(KeyError), new_folder(target):
        raise KeyError
    assert list(tmp_path.rglob("*")) == [target.parent.parent], "what was there stays, empty or not"
    with new_folder(target) as partial:
        (partial / "written").touch()
    assert (target / "written").is_file()


def test_new_folder_refuses_an_existing_one_unless_forced(tmp_path: Path) -> None:
    make_bundle(tmp_path / "out")
    with pytest.raises(OutputError, match="--force"), new_folder(tmp_path / "out"):
        pass
    assert content_of(tmp_path / "out") == "old"
    with new_folder(tmp_path / "out", force=True) as partial:
        (partial / "new").write_text("x")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


def test_force_replaces_an_empty_folder_and_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", make_bundle(tmp_path / "bundle")):
        replace(target)
        assert content_of(target) == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "empty"]


def test_force_replaces_engines_and_heads(tmp_path: Path) -> None:
    engine = '{"schema_version": 3, "device": "cpu", "builder": {}, "files": {"decoder.onnx": "0"}}'
    heads = '{"options": {}, "held_out_accuracy": []}'
    for name, document, other in (("engine.json", engine, "decoder.onnx"), ("report.json", heads, "heads.safetensors")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(document)
        (folder / other).write_text("x")
        replace(folder)
        assert content_of(folder) == "new"


def photos(folder: Path) -> Path:
    (folder / "photos").mkdir(parents=True)
    (folder / "photos/cat.jpg").write_text("cat")
    return folder


def repository(folder: Path) -> Path:
    make_bundle(folder)
    (folder / ".git").mkdir()
    (folder / ".git/HEAD").write_text("ref: refs/heads/main")
    return folder


def with_notes(folder: Path) -> Path:
    make_bundle(folder)
    (folder / "graphs/notes.txt").write_text("mine")
    return folder


def web_application(folder: Path) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"name": "an app", "icons": []}')
    return folder


def a_file(file: Path) -> Path:
    file.write_text("thesis")
    return file


def a_link(link: Path) -> Path:
    link.symlink_to(make_bundle(link.with_name("elsewhere")))
    return link


def a_dangling_link(link: Path) -> Path:
    link.symlink_to("nowhere")
    return link


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (photos, "it holds photos"),
        (repository, "it holds .git/HEAD"),
        (with_notes, "it holds graphs/notes.txt"),
        (web_application, "it holds manifest.json"),
        (a_file, "it is a file"),
        (a_link, "it is a link"),
        (a_dangling_link, "it is a link"),
    ],
)
def test_force_replaces_nothing_else(tmp_path: Path, make: Callable[[Path], Path], reason: str) -> None:
    target = make(tmp_path / "target")
    before = listing(tmp_path)
    with pytest.raises(OutputError, match=f"target is not replaced, not even with --force: .*{re.escape(reason)}"):
        replace(target)
    assert listing(tmp_path) == before


def listing(folder: Path) -> dict[str, str]:
    return {str(p): p.read_text() if p.is_file() else str(p.readlink()) if p.is_symlink() else "" for p in folder.rglob("*")}


def test_force_replaces_no_folder_that_somebody_lives_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "home" / "bundle")
    monkeypatch.setenv("HOME", str(bundle))
    with pytest.raises(OutputError, match="it is the home folder"):
        replace(bundle)
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    monkeypatch.chdir(bundle)
    for name in (".", str(bundle), "graphs/.."):
        with pytest.raises(OutputError, match="it is the current folder"):
            replace(Path(name))
    with pytest.raises(OutputError, match="it holds the current folder"):
        replace(Path(".."))
    with pytest.raises(OutputError, match="/ is not replaced"):
        replace(Path("/"))
    assert content_of(bundle) == "old"


def test_a_folder_that_changes_meanwhile_is_checked_again(tmp_path: Path) -> None:
    target = make_bundle(tmp_path / "target")
    with pytest.raises(OutputError, match=r"it holds notes\.txt"), new_folder(target, force=True) as folder:
        write_bundle(folder, "new")
        (target / "notes.txt").write_text("mine")
    assert (target / "notes.txt").read_text() == "mine" and content_of(target) == "old"
    with pytest.raises(OutputError, match="exists and is not overwritten"), new_folder(tmp_path / "late") as folder:
        make_bundle(tmp_path / "late")
    assert content_of(tmp_path / "late") == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["late", "target"]


def test_the_block_may_change_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with new_folder(Path("out")) as folder:
        write_bundle(folder, "new")
        os.chdir("elsewhere")
    assert content_of(tmp_path / "out") == "new"


def killed_at(step: int, work: Callable[[], Any]) -> bool:
    """Run `work` in a child process that is killed before its file system call number `step`; False if it ended."""
    child = os.fork()
    if child == 0:
        calls = 0

        def audit(event: str, arguments: object) -> None:
            nonlocal calls
            if event not in STEPS:
                return
            calls += 1
            if calls > step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def edit(target: Path) -> None:
    with edited_folder(target) as folder:
        (folder / GRAPH).unlink()
        write_manifest(folder, MANIFEST)  # so that the copy is whole when the old file's name is free
        (folder / GRAPH).write_text("new")
        write_manifest(folder, MANIFEST)


@pytest.mark.parametrize("change", [replace, edit])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_bundle(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """Whole under its name, or named in the error and restored by the next run, which also deletes what was left."""
    states, step = set(), 0
    while True:
        target = make_bundle(tmp_path / str(step) / "bundle")
        killed = killed_at(step, lambda target=target: change(target))  # type: ignore[misc]
        states.add(recovered(target))
        if not killed:
            break
        step += 1
    assert step > 30 and states == {"old", "set aside", "new"}


def recovered(target: Path) -> str:
    """What the bundle holds; after a next run, which changes nothing but what the killed one left."""
    try:
        state = content_of(target)
    except BundleError as error:
        old = re.search(r"mv (\S+) ", str(error))
        assert old and content_of(Path(old[1])) == "old"
        state = "set aside"
    with pytest.raises(OutputError, match="exists and is not overwritten"), new_folder(target):
        pass
    assert content_of(target) == ("old" if state == "set aside" else state)
    with scratch_folder(target):
        pass
    assert [p.name for p in target.parent.iterdir()] == ["bundle"]
    return state


def test_leftovers_of_running_processes_stay(tmp_path: Path) -> None:
    with new_folder(tmp_path / "bundle") as folder:
        with new_folder(tmp_path / "bundle") as other:
            write_bundle(other, "other")
        assert folder.is_dir()
        shutil.rmtree(tmp_path / "bundle")
        write_bundle(folder, "new")
    assert content_of(tmp_path / "bundle") == "new"


def test_leftovers_of_another_machine_stay(tmp_path: Path) -> None:
    other = tmp_path / ".bundle.partial-999999-00000000-abcdefgh"
    other.mkdir()
    with new_folder(tmp_path / "bundle") as folder:
        write_bundle(folder, "new")
    assert other.is_dir()


def test_processes_that_write_to_one_target_leave_a_whole_bundle(tmp_path: Path) -> None:
    target, children = make_bundle(tmp_path / "bundle"), []
    for name in ("a", "b", "c"):
        child = os.fork()
        if child == 0:
            try:
                for turn in range(40):
                    replace(target, f"{name}{turn}")
                os._exit(0)
            except BaseException as error:
                print(error, file=sys.stderr)
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert content_of(target) in ("a39", "b39", "c39")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_atomic_write_leaves_one_of_both_texts_and_nothing_else(tmp_path: Path) -> None:
    file, step, seen = tmp_path / "file.json", 0, set()
    while True:
        file.write_text("old")
        killed = killed_at(step, lambda: atomic_write(file, "new" * 1000))
        seen.add(file.read_text())
        if not killed:
            break
        step += 1
    assert seen == {"old", "new" * 1000}
    atomic_write(file, "last")
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"] and file.stat().st_mode & 0o777 == 0o644


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file/out cannot be written"), new_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(OutputError, match=r"nowhere/file\.json cannot be written"):
        atomic_write(tmp_path / "nowhere/file.json", "x")


def test_an_edited_folder_shares_what_it_does_not_change(tmp_path: Path) -> None:
    target = make_bundle(tmp_path / "bundle")
    inode = (target / "tokenizer/tokenizer.json").stat().st_ino
    with pytest.raises(RuntimeError), edited_folder(target) as folder:
        (folder / GRAPH).unlink()
        raise RuntimeError
    assert content_of(target) == "old"
    edit(target)
    assert content_of(target) == "new"
    assert (target / "tokenizer/tokenizer.json").stat().st_ino == inode
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_hashes_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc")
    hashes = hash_files(tmp_path)
    assert hashes == {"a": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    check_files(tmp_path, hashes, "the list", "copy it again")
    (tmp_path / "a").write_text("abd")
    with pytest.raises(BundleError, match="a was changed after it was written: the list says sha256 ba7816bf"):
        check_files(tmp_path, hashes, "the list", "copy it again")
    (tmp_path / "a").unlink()
    with pytest.raises(BundleError, match=r"a is missing: the list lists it\. Fix: copy it again"):
        check_files(tmp_path, hashes, "the list", "copy it again")


def test_a_process_number_may_be_used_again(tmp_path: Path) -> None:
    """This very process has the number, and started after the folder was last changed: the folder is nobody's."""
    left = tmp_path / f".bundle.partial-{os.getpid()}-{output._machine()}-abcdefgh"
    left.mkdir()
    assert output._runs(os.getpid(), left)
    started = time.time() + 60
    owner = type("Owner", (), {"status": lambda self: "running", "create_time": lambda self: started})
    original, output.psutil.Process = output.psutil.Process, lambda process: owner()  # type: ignore[assignment,misc]
    try:
        assert not output._runs(os.getpid(), left)
    finally:
        output.psutil.Process = original  # type: ignore[misc]

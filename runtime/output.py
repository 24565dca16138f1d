"""Writing files and folders so that nothing is lost: hashes, replacement by rename, and what may be replaced at all.

A new folder is written next to its target under a temporary name and swapped in by renames, each of them atomic:

    .NAME.partial-OWNER  →  NAME             the new folder, once it is complete
    NAME  →  .NAME.old-OWNER                 what it replaces, until the new folder has its name
    .NAME.old-OWNER  →  .NAME.trash-OWNER    from here on it may be incomplete; it is deleted

OWNER is the process and the machine. A process that was killed leaves at most these three; the next one that writes to NAME
restores the old folder if nothing has its name, and deletes the rest. Knows nothing of what folders hold, except how to
recognise Headstart's own.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .errors import BundleError, OutputError

LEFTOVER = re.compile(r"(partial|old|trash)-(\d+)-([0-9a-f]{8})-\w+")  # after ".NAME."; process and machine
CLOCK_S = 1.0  # a folder's change time is rounded; a process starts at least this much later than one whose number it reuses


@dataclass(frozen=True)
class Kind:
    """A kind of folder that Headstart writes, recognised by a JSON document in it.

    Attributes:
        name: in messages.
        document: the file's name; its "files", if it has them, lists what else the folder holds.
        keys: that the document must have.
        own: pattern of paths that are Headstart's without being listed.
    """

    name: str
    document: str
    keys: frozenset[str]
    own: str


KINDS = (
    Kind("a bundle", "manifest.json", frozenset({"schema_version", "model", "graphs", "provenance"}), r"(engines|tuning)/.*"),
    Kind("an engine", "engine.json", frozenset({"schema_version", "device", "builder"}), r"(?!)"),
    Kind("draft heads", "report.json", frozenset({"options", "held_out_accuracy"}), r"config\.json|[^/]+\.safetensors"),
)


def check_files(folder: Path, hashes: Mapping[str, str], listing: str, fix: str) -> None:
    """Compare files with the sha256 that `listing` gives them. Raises BundleError for one that is missing or was edited."""
    for name, expected in hashes.items():
        file = folder / name
        if not file.is_file():
            raise BundleError(f"{file} is missing: {listing} lists it. Fix: {fix}.")
        actual = sha256_of(file)
        if actual != expected:
            raise BundleError(
                f"{file} was changed after it was written: {listing} says sha256 {expected[:16]}…, "
                f"the file has {actual[:16]}…. Fix: {fix}."
            )


def hash_files(folder: Path, chosen: Callable[[Path], bool] = lambda relative: True) -> dict[str, str]:
    """sha256 of the files below `folder` that are `chosen`, by path relative to it."""
    files = {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {relative.as_posix(): sha256_of(file) for relative, file in files.items() if chosen(relative)}


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def atomic_write(file: Path, text: str) -> None:
    """Write the whole text or nothing. Raises OutputError when the file cannot be written."""
    try:
        sweep(file)
        handle, name = tempfile.mkstemp(prefix=_prefix(file, "partial"), dir=file.parent)
        partial = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            partial.chmod(0o644)  # mkstemp makes it private
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror}. Fix: choose a folder you can write to.") from error


@contextmanager
def new_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and is removed otherwise.

    An existing target is replaced only with `force`, and only if it is empty or entirely Headstart's own output; it stays
    whole until the new folder is complete. Several processes may write to one target: the last to finish wins.

    Raises OutputError when `target` exists and may not be replaced, or cannot be written.
    """
    # Absolute, since the block may change the current folder; a link stays one, so that it is recognised.
    place = target.resolve() if target.name in ("", "..") else target.parent.resolve() / target.name
    with _writing(target):
        restore(place)
        check_replaceable(place, force)
    with scratch_folder(place) as partial, _swapped(partial, place, lambda folder: _refusal(target, folder, force)):
        yield partial


@contextmanager
def edited_folder(target: Path) -> Iterator[Path]:
    """A copy of the folder `target` that replaces it when the block ends well.

    Files of the copy are hard links where the disk has them: replace or delete them, and never write into them.

    Raises OutputError when the folder next to it cannot be written.
    """
    place = target.resolve()
    with scratch_folder(place) as partial, _swapped(partial, place, lambda folder: None):
        with _writing(target):
            shutil.copytree(place, partial, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        yield partial


def _link(source: str, copy: str) -> None:
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:  # a disk without hard links
        shutil.copy2(source, copy)


@contextmanager
def _swapped(partial: Path, target: Path, refusal: Callable[[Path], OutputError | None]) -> Iterator[None]:
    """Swap `partial` in for `target` when the block ends well; whatever happens, one of them has the name afterwards."""
    old = partial.with_name(partial.name.replace(f".{target.name}.partial-", f".{target.name}.old-", 1))
    try:
        yield
        with _writing(target):
            partial.chmod(0o755)  # mkdtemp makes it private
            _swap(partial, target, old, refusal)
    finally:
        _finish(old, target)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target`, on the same disk so that it can be renamed; removed when the block ends.

    Parent folders of `target` that were missing are made, and removed again where nothing was written into them.

    Raises OutputError when the parent folder cannot be written.
    """
    with _writing(target):
        missing = [folder for folder in target.parents if not folder.exists()]
        partial = _new_partial(target)
    try:
        yield partial
    finally:
        _delete(partial)  # also on Ctrl-C; after a rename there is nothing left to delete
        for folder in missing:  # innermost first; what was made for nothing goes as well
            with contextlib.suppress(OSError):  # it holds what was written
                folder.rmdir()


def _new_partial(target: Path) -> Path:
    """A new temporary folder for `target`, in its parent folder, which is made if it is missing."""
    while True:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        with contextlib.suppress(FileNotFoundError):  # another process that wrote nothing has just removed the parent folder
            return Path(tempfile.mkdtemp(prefix=_prefix(target, "partial"), dir=target.parent))


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}. Fix: choose a folder you can write to.") from error


def check_replaceable(target: Path, force: bool) -> None:
    """Raises OutputError when `target` exists, unless `force` is given and nothing of the user's would be lost."""
    with contextlib.suppress(FileNotFoundError):  # nothing there, or another process is replacing it at this moment
        before = target.lstat()
        refusal = _refusal(target, target, force)
        after = target.lstat()
        if refusal and (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns):
            raise refusal


def _refusal(target: Path, folder: Path, force: bool) -> OutputError | None:
    """The error where `folder`, which has or had the name `target`, may not be replaced."""
    if not force:
        return OutputError(f"{target} exists and is not overwritten. Fix: another folder, or --force.")
    reason = _protected(folder) or _foreign(folder)
    if not reason:
        return None
    return OutputError(
        f"{target} is not replaced, not even with --force: {reason}. Only what Headstart wrote is replaced. "
        "Fix: another folder, or move this one away yourself."
    )


def _protected(target: Path) -> str:
    """Why this path is never replaced, whatever it holds; empty when it may be."""
    mode = target.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "it is a link"
    if not stat.S_ISDIR(mode):
        return "it is a file"
    real = target.resolve()
    for place, name in ((Path.cwd(), "the current folder"), (_home(), "the home folder")):
        if real == place:
            return f"it is {name}"
        if real in place.parents:
            return f"it holds {name}"
    return "a disk is mounted there" if real.is_mount() else ""


def _home() -> Path:
    try:
        return Path.home().resolve()
    except RuntimeError:  # a user without one
        return Path("/")


def _foreign(folder: Path) -> str:
    """What this folder holds that Headstart did not write; empty when there is no such thing."""
    entries = sorted(entry.name for entry in folder.iterdir())
    if not entries:
        return ""
    for kind in KINDS:
        document = _document(folder / kind.document) if kind.document in entries else {}
        if kind.keys <= document.keys():
            return next((f"it holds {name}" for name in _unlisted(folder, kind, document)), "")
    return f"it is not {', '.join(kind.name for kind in KINDS[:-1])} or {KINDS[-1].name}; it holds {', '.join(entries[:3])}"


def _document(file: Path) -> dict[str, Any]:
    """Empty for a file that is no JSON object."""
    try:
        document = json.loads(file.read_bytes())
    except (IsADirectoryError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _unlisted(folder: Path, kind: Kind, document: Mapping[str, Any]) -> Iterator[str]:
    files = document.get("files")
    listed = {kind.document, *(files if isinstance(files, dict) else ())}
    for parent, _, names in os.walk(folder):
        for name in names:
            relative = (Path(parent) / name).relative_to(folder).as_posix()
            partial = LEFTOVER.fullmatch(name.removeprefix(f".{kind.document}."))
            if relative not in listed and not partial and not re.fullmatch(kind.own, relative):
                yield relative


def _swap(partial: Path, target: Path, old: Path, refusal: Callable[[Path], OutputError | None]) -> None:
    """Rename `target` to `old` and `partial` to `target`."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # nothing there, or another process has just renamed it
            target.replace(old)
            refused = refusal(old)  # once more, much time has passed; under this name no other process changes it
            if refused:
                raise refused
        try:
            partial.replace(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _discard(old, target)  # another process finished first: what it wrote is replaced as well


def _finish(old: Path, target: Path) -> None:
    """Restore `old` if nothing replaced it, else delete it."""
    if not os.path.lexists(old):
        return
    if not os.path.lexists(target):
        with contextlib.suppress(OSError):  # another process has just finished: its output stays
            old.replace(target)
            return
    _discard(old, target)


def _discard(old: Path, target: Path) -> None:
    """Delete `old` under a name from which it is never restored: deletion may be interrupted half-way."""
    trash = old.with_name(old.name.replace(f".{target.name}.old-", f".{target.name}.trash-", 1))
    _delete(trash)
    with contextlib.suppress(OSError):
        old.replace(trash)
    _delete(trash)


def restore(target: Path) -> None:
    """Give the old folder its name back if its replacement was killed between the two renames."""
    olds = [path for role, path in _leftovers(target) if role == "old"]
    if olds and not os.path.lexists(target):
        with contextlib.suppress(OSError):  # another process restores it, or has written a new one
            max(olds, key=lambda path: path.lstat().st_ctime).replace(target)


def sweep(target: Path) -> None:
    """Delete what processes that no longer run left next to `target`; an old folder only when it is not needed any more."""
    for role, path in _leftovers(target):
        if role != "old":
            _delete(path)
        elif os.path.lexists(target):
            _discard(path, target)


def interrupted(target: Path) -> Path | None:
    """The old folder of a replacement that was killed between the two renames; None when there is none."""
    if os.path.lexists(target):
        return None
    return next((path for role, path in _leftovers(target) if role == "old"), None)


def _leftovers(target: Path) -> list[tuple[str, Path]]:
    """(partial, old or trash; path) of what processes that no longer run left next to `target`."""
    prefix, dead = f".{target.name}.", []
    if not target.parent.is_dir():
        return []
    for path in target.parent.iterdir():
        match = LEFTOVER.fullmatch(path.name.removeprefix(prefix)) if path.name.startswith(prefix) else None
        if match and match[3] == _machine() and not _runs(int(match[2]), path):
            dead.append((match[1], path))
    return dead


def _runs(process: int, path: Path) -> bool:
    """Whether the process that wrote `path` still runs. Another one may have its number since: it started later."""
    try:
        owner = psutil.Process(process)
        return owner.status() != psutil.STATUS_ZOMBIE and owner.create_time() <= path.lstat().st_ctime + CLOCK_S
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.AccessDenied:
        return True


def _prefix(target: Path, role: str) -> str:
    return f".{target.name}.{role}-{os.getpid()}-{_machine()}-"


def _machine() -> str:
    """Of this machine: process numbers of another one that shares the disk say nothing here."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()

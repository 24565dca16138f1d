"""Writing files and folders so that nothing is lost: hashes, and replacement by rename."""

import hashlib
import shutil
import tempfile
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import BundleError, OutputError


def check_files(folder: Path, hashes: Mapping[str, str], listing: str, fix: str) -> None:
    """Compare files with the sha256 that `listing` gives them. Raises BundleError for one that is missing or was edited."""
    for name, expected in hashes.items():
        file = folder / name
        if not file.is_file():
            raise BundleError(f"{file} is missing: {listing} lists it. Fix: {fix}.")
        found = sha256_of(file)
        if found != expected:
            raise BundleError(
                f"{file} was changed after it was written: {listing} says sha256 {expected[:16]}…, "
                f"the file has {found[:16]}…. Fix: {fix}."
            )


def hash_files(folder: Path, chosen: Callable[[Path], bool] = lambda relative: True) -> dict[str, str]:
    """sha256 of the files below `folder`, by path relative to it; of those that are `chosen`."""
    files = {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {relative.as_posix(): sha256_of(file) for relative, file in files.items() if chosen(relative)}


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return (
            hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_by_block(stream)
        )


def _sha256_by_block(stream: typing.BinaryIO) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def atomic_write(file: Path, text: str) -> None:
    """Write beside the file, then rename over it."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(file)


@contextmanager
def new_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well, and is removed otherwise.

    Raises OutputError when `target` exists (unless `force`) or its parent cannot be written.
    """
    if target.exists() and not force:
        raise OutputError(f"{target} exists and is not overwritten. Fix: another folder, or --force.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}. Fix: choose a folder you can write to.") from error
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        if target.exists():
            shutil.rmtree(target)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing left after a rename; also runs on Ctrl-C

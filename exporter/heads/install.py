"""Adding a draft head to an existing bundle."""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from headstart.runtime.bundle import MANIFEST, Bundle, HeadInfo, Manifest, write_manifest
from headstart.runtime.errors import OutputError, missing_extra
from headstart.runtime.output import atomic_write

Write = Callable[[Path, Manifest], Manifest]  # (folder to write heads/<name> in, the manifest without it) -> with it


def import_head(
    bundle: str | Path,
    folder: str | Path,
    name: str | None = None,
    top_k: int = 10,
    force: bool = False,
    lossy: bool = False,
) -> HeadInfo:
    """Import the head in `folder` into a finished bundle, as `heads/<name>`; of a lossy format only when `lossy`.

    The head is built next to the bundle and renamed into it, then the manifest is rewritten: a failure or an interrupt leaves
    the bundle as it was.

    Raises:
        BundleError: no valid bundle.
        HeadError: another family, a lossy format, made for another target, damaged weights, or a name that no head can have.
        OutputError: the bundle has a head of that name (unless `force`).
    """
    try:
        from .families import add_head, default_name, recognise
    except ModuleNotFoundError as error:
        raise missing_extra(error, "Importing a head") from error
    opened = Bundle.load(Path(bundle).resolve())  # "." has no parent in its name
    head = recognise(Path(folder), lossy)
    name = default_name(opened.manifest, head.family) if name is None else name

    def write(workplace: Path, others: Manifest) -> Manifest:
        return add_head(workplace, others, head, name, top_k, opened.path)

    return install_head(opened, name, write, force)


def install_head(opened: Bundle, name: str, write: Write, force: bool = False) -> HeadInfo:
    """Let `write` write `heads/<name>` next to the bundle, and move it in; see `import_head`."""
    check_place(opened, name, force)
    others = dataclasses.replace(opened.manifest, heads=tuple(h for h in opened.manifest.heads if h != name))
    with _workplace(opened.path) as workplace:
        manifest = write(workplace, others)
        _swap_in(workplace, opened.path, name, manifest)
    return Bundle(opened.path, manifest).head(name)


def check_place(bundle: Bundle, name: str, force: bool) -> None:
    """Raises HeadError for a name that no head can have, OutputError where one has it (unless `force`)."""
    from .families import check_name

    check_name(name)
    target = bundle.path / "heads" / name
    if target.exists() and not force:
        raise OutputError(f"{target} exists and is not overwritten. Fix: another --name, or --force.")


@contextmanager
def _workplace(bundle: Path) -> Iterator[Path]:
    """A temporary folder next to the bundle: on the same disk, so that renaming works, and outside the hashed files."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{bundle.name}.head-", dir=bundle.parent))
    except OSError as error:
        raise OutputError(
            f"{bundle.parent} cannot be written: {error.strerror}. The head is built there before it is moved into the bundle. "
            "Fix: a bundle in a folder you can write to."
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap_in(workplace: Path, bundle: Path, name: str, manifest: Manifest) -> None:
    """Swap `heads/<name>` and rewrite the manifest; put both back when anything, Ctrl-C included, comes between."""
    new, target, old = workplace / "heads" / name, bundle / "heads" / name, workplace / "old"
    before = (bundle / MANIFEST).read_text("utf-8")
    try:
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            target.replace(old)
        new.replace(target)
        write_manifest(bundle, manifest)
    except BaseException:
        _put_back(new, target, old)
        atomic_write(bundle / MANIFEST, before)
        raise


def _put_back(new: Path, target: Path, old: Path) -> None:
    if not new.exists():  # it was moved in already
        shutil.rmtree(target)
    if old.exists():
        old.replace(target)
    if target.parent.is_dir() and not any(target.parent.iterdir()):
        target.parent.rmdir()

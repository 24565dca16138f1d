"""Adding a draft head to a bundle that is already there."""

import dataclasses
import shutil
import tempfile
from pathlib import Path

from headstart.runtime.bundle import Bundle, HeadInfo, write_manifest
from headstart.runtime.errors import OptionError, OutputError, missing_extra


def import_head(
    bundle: str | Path, folder: str | Path, name: str | None = None, top_k: int = 10, force: bool = False
) -> HeadInfo:
    """Import the head in `folder` into a finished bundle, as `heads/<name>`.

    The head is built beside its place and renamed into it, then the manifest is rewritten: whatever fails or interrupts
    before that leaves the bundle as it was.

    Raises:
        BundleError: no valid bundle.
        HeadError: another family, or made for another target.
        OutputError: the bundle has a head of that name (unless `force`).
    """
    try:
        from .medusa import add_head, default_name
    except ModuleNotFoundError as error:
        raise missing_extra(error, "Importing a head") from error
    opened = Bundle.load(bundle)
    name = name or default_name(opened.manifest)
    if not name.isidentifier() or name in ("auto", "none", "ngram", "draft_model"):
        raise OptionError(f"{name!r} cannot name a head: letters, digits and _ only, and not auto, none, ngram or draft_model.")
    target = opened.path / "heads" / name
    if target.exists() and not force:
        raise OutputError(f"{target} exists and is not overwritten. Fix: another --name, or --force.")
    others = dataclasses.replace(opened.manifest, heads=tuple(h for h in opened.manifest.heads if h != name))
    workplace = Path(tempfile.mkdtemp(prefix=f".{opened.path.name}.head-", dir=opened.path.parent))
    try:
        manifest = add_head(workplace, others, Path(folder), name, top_k)
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(exist_ok=True)
        (workplace / "heads" / name).replace(target)
        write_manifest(opened.path, manifest)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return Bundle(opened.path, manifest).head(name)

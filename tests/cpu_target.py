"""The CPU's target after all graphs are written, before they are compared: for tests that change what was written."""

from pathlib import Path

from headstart.exporter import canonical
from headstart.exporter.targets.cpu import CpuOptions, CpuTarget
from headstart.runtime.bundle import Bundle


def written(bundle: Bundle, folder: Path) -> CpuTarget:
    """`folder` is made for the engine."""
    folder.mkdir()
    target = CpuTarget(bundle, "cpu", folder, CpuOptions(), lambda stage: None)
    for name in bundle.graphs:
        target.write(name, target.lower(name, canonical.load_graph(bundle, name)))
    return target

"""What rounding activations to 8 bits does to a model by itself: the rounded reference against the reference as written.

Where a few channels are large, the last bit of a float decides about whole steps, and two graphs that round alike are as far
from each other as from the floats. Measured on the reference alone, never on the engine under test.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import missing_extra
from headstart.runtime.precision import Difference

from .reference import Reference, Text, spread_of


def rounding_noise(reference: Reference, texts: Sequence[Text]) -> Difference:
    """Over all rows of the texts. Raises MissingExtraError without the export extra."""
    bundle = reference.engine.bundle
    with tempfile.TemporaryDirectory(prefix="headstart-verify-") as folder:
        rounded = Reference.open(_rounded(bundle, Path(folder)))
        rows = []
        for text in texts:
            wanted = reference.logits(text)
            rows.append(np.abs(rounded.logits(text) - wanted).max(axis=-1) / spread_of(wanted))
    relative = np.concatenate(rows)
    return Difference(float(relative.max()), float(np.median(relative)))


def _rounded(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle's encoder and decoder with rounded activations, in another folder."""
    try:
        from headstart.exporter.canonical import load_graph
        from headstart.exporter.graph import save_graph
        from headstart.exporter.passes.row_rounding import round_rows
    except ModuleNotFoundError as error:
        raise missing_extra(error, "Measuring what rounding does") from error
    graphs = {name: info for name, info in bundle.manifest.graphs.items() if name in ("encoder", "decoder")}
    for name, info in graphs.items():
        save_graph(round_rows(load_graph(bundle, name))[0], folder / info.file)
    return Bundle(folder, dataclasses.replace(bundle.manifest, graphs=graphs, heads=()))

"""Statistics of the linear layers' inputs over calibration data, one encoder or decoder layer at a time.

The canonical graph is cut after the observed layer and run by ONNX Runtime, passage by passage, so that memory
holds one layer's sums and never all activations.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.exporter.passes.linear import Linear
from headstart.exporter.passes.values import name_of

from .feeds import Feeds, opened

ROWS = 2048  # multiplied at once
LAYER = re.compile(r".*?\.(?:layers?|h|blocks?)\.\d+(?=\.)")  # up to the first number: T5 counts blocks, and parts in them


@dataclass
class Statistics:
    """Sums over the rows that one value took.

    Attributes:
        gram: [K, K] float64, Σ xᵀx: the Hessian of the layer's squared output error, up to a factor.
        magnitude: [K] float64, Σ |x|.
        largest: [K] float64, max |x|.
        rows: their number.
    """

    gram: NDArray[np.float64]
    magnitude: NDArray[np.float64]
    largest: NDArray[np.float64]
    rows: int = 0

    @classmethod
    def empty(cls, width: int) -> "Statistics":
        return cls(np.zeros((width, width)), np.zeros(width), np.zeros(width))

    def add(self, values: NDArray[np.float32]) -> None:
        """Add [rows, K]."""
        self.gram += values.T @ values
        self.magnitude += np.abs(values).sum(axis=0)
        self.largest = np.maximum(self.largest, np.abs(values).max(axis=0))
        self.rows += len(values)

    def divide(self, scale: NDArray[np.float32]) -> None:
        """Become the statistics of x / scale; scale [K]."""
        self.gram /= np.outer(scale, scale)
        self.magnitude /= scale
        self.largest /= scale


def layer_of(linear: Linear) -> str:
    """Which encoder or decoder layer a weight belongs to, by its name in the checkpoint; its own name if it has none."""
    match = LAYER.match(f".{linear.name}")
    return match[0] if match else linear.name


def observe(model: Any, linears: Sequence[Linear], feeds: Feeds) -> dict[str, Statistics]:
    """Statistics by the name of the value that each of `linears` reads; layers that read one value share them."""
    widths = {name_of(linear.source): linear.shape[0] for linear in linears}
    sums = {name: Statistics.empty(width) for name, width in widths.items()}
    for arrays in _gathered(activations(model, list(sums), feeds)):
        for statistics, values in zip(sums.values(), arrays, strict=True):
            statistics.add(values)
    return sums


def _gathered(runs: Iterator[list[NDArray[Any]]]) -> Iterator[list[NDArray[Any]]]:
    """[…, K] values of several runs concatenated to [rows, K]: many short passages would mean many small products."""
    waiting: list[list[NDArray[Any]]] = []
    rows = 0
    for arrays in runs:
        waiting.append([values.reshape(-1, values.shape[-1]) for values in arrays])
        rows += len(waiting[-1][0])
        if rows >= ROWS:
            yield [np.concatenate(parts) for parts in zip(*waiting, strict=True)]
            waiting, rows = [], 0
    if waiting:
        yield [np.concatenate(parts) for parts in zip(*waiting, strict=True)]


def activations(model: Any, names: Sequence[str], feeds: Feeds) -> Iterator[list[NDArray[Any]]]:
    """The values of those names, run by run, from the part of the model that computes them."""
    if not names:
        return
    with opened(model, names) as session:
        for inputs in feeds({value.name for value in session.get_inputs()}):
            yield session.run(list(names), inputs)

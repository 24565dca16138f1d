"""What the linear layers read: statistics of their inputs over calibration text, one decoder layer at a time.

The canonical graph is cut behind the layer that is looked at and run by ONNX Runtime, window by window, so that memory holds
one layer's sums and never the text's activations.
"""

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.exporter.passes.linear import Linear
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.provider import open_session
from headstart.runtime.errors import OptionError
from headstart.runtime.prompts import text_of
from headstart.runtime.tokenizer import Tokenizer

WINDOW = 256  # tokens that attend to one another
KEYS = ("text", "prompt")  # of a JSON line, the first that is there
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass
class Statistics:
    """Sums over the rows that one value took.

    Attributes:
        gram: [K, K] float64, Σ xᵀx: the Hessian of the layer's squared output error, up to a factor.
        magnitude: [K] float64, Σ |x|.
        largest: [K] float64, max |x|.
        rows: how many.
    """

    gram: NDArray[np.float64]
    magnitude: NDArray[np.float64]
    largest: NDArray[np.float64]
    rows: int = 0

    @classmethod
    def empty(cls, width: int) -> "Statistics":
        return cls(np.zeros((width, width)), np.zeros(width), np.zeros(width))

    def add(self, values: NDArray[np.float32]) -> None:
        """Take in [rows, K]."""
        self.gram += values.T @ values
        self.magnitude += np.abs(values).sum(axis=0)
        self.largest = np.maximum(self.largest, np.abs(values).max(axis=0))
        self.rows += len(values)

    def divide(self, scale: NDArray[np.float32]) -> None:
        """Become the statistics of x / scale; scale [K]."""
        self.gram /= np.outer(scale, scale)
        self.magnitude /= scale
        self.largest /= scale


def calibration_windows(bundle: Bundle, data: Path, tokens: int) -> NDArray[np.int64]:
    """[windows, WINDOW] of the text's first tokens. Raises OptionError when the file holds too little, or no text."""
    window = min(WINDOW, bundle.manifest.model.max_cache)
    text = "\n".join(read_texts(data))
    ids = Tokenizer.load(bundle.path / "tokenizer").encode(text)
    if len(ids) < 2 * window:
        raise OptionError(
            f"{data} holds {len(ids)} tokens; calibration needs at least {2 * window}. "
            "Fix: more text of the kind that will be decoded."
        )
    count = max(1, min(tokens, len(ids)) // window)
    return np.array(ids[: count * window], np.int64).reshape(count, window)


def read_texts(data: Path) -> list[str]:
    """A text file whole, or the "text" (or "prompt") of each JSON line. Raises OptionError for anything else."""
    try:
        content = data.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{data} cannot be read as UTF-8 text ({error}). Fix: a text file, or JSON Lines (.jsonl)."
        ) from error
    if data.suffix != ".jsonl":
        return [content]
    return [_text_of(data, number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]


def _text_of(data: Path, number: int, line: str) -> str:
    try:
        text = text_of(line, KEYS)
    except ValueError as error:
        raise OptionError(f"{data} line {number} is not JSON ({error}). Fix: one object a line.") from error
    if text is None:
        raise OptionError(
            f'{data} line {number} has no text under "text" or "prompt", found {line[:60]!r}. Fix: one such object a line.'
        )
    return text


def layer_of(linear: Linear) -> str:
    """Which decoder layer a weight belongs to, by its name in the checkpoint; its own name where that tells none."""
    found = LAYER.search(f".{linear.name}")
    return found[1] if found else linear.name


def observe(model: Any, linears: Sequence[Linear], bundle: Bundle, windows: NDArray[np.int64]) -> dict[str, Statistics]:
    """Statistics by the name of the value that each of `linears` reads; layers that read one value share them."""
    widths = {linear.node.inputs[0].name: linear.shape[0] for linear in linears}
    sums = {name: Statistics.empty(width) for name, width in widths.items()}
    for arrays in activations(model, list(sums), bundle, windows):
        for statistics, values in zip(sums.values(), arrays, strict=True):
            statistics.add(values.reshape(-1, values.shape[-1]))
    return sums


def activations(model: Any, names: list[str], bundle: Bundle, windows: NDArray[np.int64]) -> Iterator[list[NDArray[Any]]]:
    """The values of those names, window by window, from the part of the model that computes them."""
    with tempfile.TemporaryDirectory(prefix="headstart-calibration-") as folder:
        session = _cut(model, names, Path(folder))
        for feeds in _feeds(session, bundle, windows):
            yield session.run(names, feeds)


def _cut(model: Any, outputs: list[str], folder: Path) -> Any:
    """A session of the part of the model that computes `outputs`."""
    import onnx_ir as ir
    from onnx_ir.convenience import extract

    part = extract(model.graph, inputs=[value.name for value in model.graph.inputs], outputs=outputs)
    ir.save(ir.Model(part, ir_version=model.ir_version), folder / "cut.onnx", external_data="cut.onnx.data")
    return open_session(folder / "cut.onnx", 0)


def _feeds(session: Any, bundle: Bundle, windows: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """One run's inputs per window: a causal chain over an empty cache."""
    length = windows.shape[1]
    rows = np.arange(length)[None]
    fixed: dict[str, Any] = {
        contract.POSITION_IDS: rows,
        contract.ATTENTION_MASK: np.tri(length, dtype=np.bool_)[None, None],
        contract.WRITE_INDEX: np.zeros(1, np.int64),
        contract.OUTPUT_ROWS: np.zeros((1, 1), np.int64),
    }
    for cache in bundle.manifest.caches:
        fixed[cache.key_name] = np.zeros((1, cache.kv_heads, length, cache.key_size), np.float32)
        fixed[cache.value_name] = np.zeros((1, cache.kv_heads, length, cache.value_size), np.float32)
    wanted = {value.name for value in session.get_inputs()}
    for window in windows:
        yield {name: value for name, value in (fixed | {contract.INPUT_IDS: window[None]}).items() if name in wanted}

"""Which values of a model leave float16's range: found by running its graphs in float32 on the golden inputs.

Half precision ends at 65,504. T5's feed-forward layers and some residual streams go beyond, and what overflows becomes infinite
and then no number at all. The values found here, and the layers that make or read them, are kept in float32 when an engine is
built in float16 (`passes.half`); the bundle records them, so that a board without ONNX Runtime knows them too.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import GOLDEN, Bundle, Manifest
from headstart.runtime.engines.ort_session import open_session

from .chain import causal_chain

LIMIT = 65504 / 4  # texts that were not looked at may go further
MASK = 1e30  # what is as large as this stands for minus infinity in a mask, or was added to one
LARGEST = "headstart.largest"  # [values] float32, the output that is added
WATCHED = ("decoder", "encoder")  # of a bundle's graphs; the front-end is built in float32


def overflowing(folder: Path, manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """Graph of the bundle in `folder` -> those of its values that went beyond the limit.

    Raises MissingExtraError without ONNX Runtime, EngineError for one that is too old.
    """
    with tempfile.TemporaryDirectory(prefix="headstart-range-") as scratch:
        graphs = {
            name: _Watched(folder / info.file, Path(scratch)) for name, info in manifest.graphs.items() if name in WATCHED
        }
        for text, source in _golden(folder):
            states = _encode(graphs["encoder"], manifest, source) if "encoder" in graphs else {}
            graphs["decoder"].run(causal_chain(manifest, text, np.arange(text.shape[1])[None]) | states)
    return {name: graph.beyond(LIMIT) for name, graph in graphs.items()}


def float16_overflows(bundle: Bundle, precision: str, progress: Callable[[str], None]) -> dict[str, tuple[str, ...]]:
    """Of a bundle to be built in `precision`: as its manifest says, or measured now. Empty where nothing is narrowed.

    Raises MissingExtraError where ONNX Runtime is needed to measure and is missing.
    """
    manifest = bundle.manifest
    if manifest.overflows or manifest.model.dtype != "float32" or precision != "float16":
        return manifest.overflows
    progress("measuring which values exceed float16's range")
    return overflowing(bundle.path, manifest)


class _Watched:
    """A graph that also says how large each of its values became."""

    def __init__(self, file: Path, scratch: Path) -> None:
        import onnx_ir as ir

        model = ir.load(file)
        self.names = watch(model)
        self.largest = np.zeros(len(self.names), np.float32)
        written = scratch / file.name
        ir.save(model, written, external_data=f"{file.name}.data")
        self._session = open_session(written, 0)
        self._outputs = [node.name for node in self._session.get_outputs()]
        self._inputs = {node.name for node in self._session.get_inputs()}

    def run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One pass; returns the graph's own outputs."""
        feeds = {name: value for name, value in inputs.items() if name in self._inputs}
        found = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        self.largest = np.fmax(self.largest, found.pop(LARGEST))
        return found

    def beyond(self, limit: float) -> tuple[str, ...]:
        wrong = (self.largest > limit) & (self.largest < MASK)
        return tuple(name for name, is_wrong in zip(self.names, wrong, strict=True) if is_wrong)


def watch(model: Any) -> list[str]:
    """Add the output LARGEST, the largest magnitude of every float32 value that is computed; returns the values' names."""
    import onnx_ir as ir

    from .passes.values import new_initializer

    watched = [v for node in list(model.graph) for v in node.outputs if v.dtype == ir.DataType.FLOAT and v.name]
    one = ir.tensor(np.array([1], np.int64), name="headstart.one")
    shape = new_initializer(one)
    model.graph.register_initializer(shape)
    sizes = []
    for value in watched:
        magnitude = ir.node("Abs", [value])
        size = ir.node("ReduceMax", magnitude.outputs, attributes={"keepdims": 0})
        flat = ir.node("Reshape", [size.outputs[0], shape])
        for node in (magnitude, size, flat):
            model.graph.append(node)
        sizes.append(flat.outputs[0])
    joined = ir.node("Concat", sizes, attributes={"axis": 0})
    model.graph.append(joined)
    out = joined.outputs[0]
    out.name, out.dtype, out.shape = LARGEST, ir.DataType.FLOAT, ir.Shape([len(watched)])
    model.graph.outputs.append(out)
    return [value.name for value in watched]


def _golden(folder: Path) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """([1, tokens] each golden text with what the model said behind it, [1, …] the source it was said of)."""
    with np.load(folder / GOLDEN) as golden:
        texts = np.concatenate([golden["input_ids"], golden["greedy"]], axis=1)
        sources = golden["sources"] if "sources" in golden else np.zeros((len(texts), 0))
    for text, source in zip(texts, sources, strict=True):
        yield text[None], source[None]


def _encode(encoder: _Watched, manifest: Manifest, source: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What the decoder reads of [1, …] one source, none of it masked."""
    mask = np.ones(source.shape[:2], np.bool_)
    found = encoder.run({manifest.graphs["encoder"].inputs[0].name: source, contract.ENCODER_MASK: mask})
    return found | {contract.ENCODER_MASK: np.ones((1, found[contract.ENCODER_HIDDEN].shape[1]), np.bool_)}

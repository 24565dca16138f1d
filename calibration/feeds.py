"""Inputs of the graphs under observation: those of one run for each passage, computed lazily."""

import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from headstart.exporter.chain import causal_chain
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.ort_session import open_session

from .passages import Passage

Inputs = dict[str, Any]


class Feeds(Protocol):
    """Inputs by name, run by run."""

    def __call__(self, wanted: Collection[str]) -> Iterator[Inputs]:
        """The `wanted` inputs of each run; no others are computed."""
        ...


class EncoderFeeds:
    """One run of the encoder over each passage's source."""

    def __init__(self, bundle: Bundle, passages: Sequence[Passage]) -> None:
        self._input = bundle.manifest.graphs["encoder"].inputs[0]
        self._passages = passages

    def __call__(self, wanted: Collection[str]) -> Iterator[Inputs]:
        for passage in self._passages:
            assert passage.source is not None
            source = np.ascontiguousarray(passage.source, self._input.dtype)[None]
            inputs = {self._input.name: source, contract.ENCODER_MASK: np.ones(source.shape[:2], np.bool_)}
            yield {name: array for name, array in inputs.items() if name in wanted}


class DecoderFeeds:
    """One run of the decoder over each passage: a causal chain over an empty cache, and the encoder's states of the source.

    `encoder`: a session of the encoder's graph. It runs again for each run here: the states of all sources would not fit
    in memory.
    """

    def __init__(self, bundle: Bundle, passages: Sequence[Passage], encoder: Any = None) -> None:
        self._bundle, self._passages, self._encoder = bundle, passages, encoder

    def __call__(self, wanted: Collection[str]) -> Iterator[Inputs]:
        for passage, source in zip(self._passages, self._read_sources(wanted), strict=True):
            inputs = causal_chain(self._bundle.manifest, passage.token_ids[None], np.zeros((1, 1), np.int64)) | source
            yield {name: array for name, array in inputs.items() if name in wanted}

    def _read_sources(self, wanted: Collection[str]) -> Iterator[Inputs]:
        """Keys, values and mask of each passage's source; nothing if none of them is wanted."""
        crossing = [info for info in self._bundle.manifest.graphs["decoder"].reads if set(info.sizes()) & set(wanted)]
        if self._encoder is None or not crossing:
            yield from ({} for _ in self._passages)
            return
        names = [name for info in crossing for name in info.sizes()]
        for inputs in EncoderFeeds(self._bundle, self._passages)({value.name for value in self._encoder.get_inputs()}):
            hidden, *states = self._encoder.run([contract.ENCODER_HIDDEN, *names], inputs)
            yield dict(zip(names, states, strict=True)) | {contract.ENCODER_MASK: np.ones(hidden.shape[:2], np.bool_)}


@contextmanager
def decoder_feeds(bundle: Bundle, passages: Sequence[Passage], encoder: Any = None) -> Iterator[Feeds]:
    """The decoder's feeds, after the current state of `encoder` (an onnx_ir Model) if the bundle has one."""
    if encoder is None:
        yield DecoderFeeds(bundle, passages)
        return
    with opened(encoder, [value.name for value in encoder.graph.outputs]) as session:
        yield DecoderFeeds(bundle, passages, session)


@contextmanager
def opened(model: Any, outputs: Sequence[str]) -> Iterator[Any]:
    """A session of the part of an onnx_ir Model that computes `outputs`, with the inputs that this part reads."""
    import onnx_ir as ir
    from onnx_ir.convenience import extract

    part = extract(model.graph, inputs=[value.name for value in model.graph.inputs], outputs=list(outputs))
    for value in [value for value in part.inputs if not value.uses()]:
        part.inputs.remove(value)
    with tempfile.TemporaryDirectory(prefix="headstart-calibration-") as folder:
        file = Path(folder) / "part.onnx"
        ir.save(ir.Model(part, ir_version=model.ir_version), file, external_data=f"{file.name}.data")
        yield open_session(file, 0, as_written=True)  # it may hold fixed scales already: the encoder's

"""What a graph is fed while it is observed: the inputs of one run for each passage, made when their turn comes."""

import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.onnxruntime import open_session

from .passages import Passage

Inputs = dict[str, Any]


class Feeds(Protocol):
    """Inputs by name, run by run."""

    def __call__(self, wanted: Collection[str]) -> Iterator[Inputs]:
        """Of each run those that are `wanted`, and no others are computed."""
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
    """One run of the decoder over each passage: a causal chain over an empty cache, and what the encoder makes of the source.

    `encoder`: a session of the encoder's graph. It runs again for each run here: what it makes of all sources would not fit
    in memory.
    """

    def __init__(self, bundle: Bundle, passages: Sequence[Passage], encoder: Any = None) -> None:
        self._caches, self._passages, self._encoder = bundle.manifest.caches, passages, encoder
        self._sources = EncoderFeeds(bundle, passages) if encoder is not None else None

    def __call__(self, wanted: Collection[str]) -> Iterator[Inputs]:
        for passage, source in zip(self._passages, self._read_sources(wanted), strict=True):
            inputs = self._chain(passage) | source
            yield {name: array for name, array in inputs.items() if name in wanted}

    def _chain(self, passage: Passage) -> Inputs:
        length = len(passage.token_ids)
        inputs = {
            contract.INPUT_IDS: passage.token_ids[None],
            contract.POSITION_IDS: np.arange(length)[None],
            contract.ATTENTION_MASK: np.tri(length, dtype=np.bool_)[None, None],
            contract.WRITE_INDEX: np.zeros(1, np.int64),
            contract.OUTPUT_ROWS: np.zeros((1, 1), np.int64),
        }
        for cache in self._caches:
            inputs[cache.key_name] = np.zeros((1, cache.kv_heads, length, cache.key_size), np.float32)
            inputs[cache.value_name] = np.zeros((1, cache.kv_heads, length, cache.value_size), np.float32)
        return inputs

    def _read_sources(self, wanted: Collection[str]) -> Iterator[Inputs]:
        """Keys, values and mask of each passage's source; nothing where nothing is wanted of it."""
        names = [] if self._encoder is None else [v.name for v in self._encoder.get_outputs() if v.name in wanted]
        if self._encoder is None or self._sources is None or not ({contract.ENCODER_MASK, *names} & set(wanted)):
            yield from ({} for _ in self._passages)
            return
        for inputs in self._sources({value.name for value in self._encoder.get_inputs()}):
            states = self._encoder.run([contract.ENCODER_HIDDEN, *names], inputs)
            yield dict(zip(names, states[1:], strict=True)) | {contract.ENCODER_MASK: np.ones(states[0].shape[:2], np.bool_)}


@contextmanager
def decoder_feeds(bundle: Bundle, passages: Sequence[Passage], encoder: Any = None) -> Iterator[Feeds]:
    """The decoder's, behind `encoder` as it is now (an onnx_ir Model), where the bundle has one."""
    if encoder is None:
        yield DecoderFeeds(bundle, passages)
        return
    with opened(encoder, [value.name for value in encoder.graph.outputs]) as session:
        yield DecoderFeeds(bundle, passages, session)


@contextmanager
def opened(model: Any, outputs: Sequence[str]) -> Iterator[Any]:
    """A session of the part of an onnx_ir Model that computes `outputs`."""
    import onnx_ir as ir
    from onnx_ir.convenience import extract

    part = extract(model.graph, inputs=[value.name for value in model.graph.inputs], outputs=list(outputs))
    with tempfile.TemporaryDirectory(prefix="headstart-calibration-") as folder:
        file = Path(folder) / "part.onnx"
        ir.save(ir.Model(part, ir_version=model.ir_version), file, external_data=f"{file.name}.data")
        yield open_session(file, 0, as_written=True)  # it may hold fixed scales already: the encoder's

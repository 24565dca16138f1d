"""The reference: the canonical graph, computed by ONNX Runtime on the CPU exactly as it is written.

It is first compared with the golden outputs that the checkpoint itself gave; the engine is then compared with it on any text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.engines.ort_session import AS_WRITTEN, RESTS, Provider
from headstart.runtime.graph import Engine
from headstart.runtime.precision import LIMITS, Difference, Limits, precision_of
from headstart.runtime.tree import DraftTree

from .passes import Logits, Source, causal_logits, tree_logits


@dataclass(frozen=True)
class Text:
    """Decoder tokens, and what the encoder reads with them where the model has one."""

    token_ids: tuple[int, ...]
    source: Source = None


class Reference:
    """Logits of texts, by the canonical graph.

    Attributes:
        noise: what rounding activations does to this graph, where the engine under test rounds them.
    """

    name = "canonical graph"

    def __init__(self, engine: Engine, noise: Difference | None = None) -> None:
        self.engine, self.noise = engine, noise

    def limits(self, precision: str) -> Limits:
        """Of an engine in that precision."""
        return LIMITS[precision] if self.noise is None else LIMITS[precision].widened(self.noise)

    @classmethod
    def open(cls, bundle: Bundle, threads: int | None = None) -> "Reference":
        """Its threads rest after each pass, for the engine compared with it runs in turn with it.

        Raises MissingExtraError without ONNX Runtime, EngineError when its CPU provider cannot run the graph.
        """
        return cls(OnnxRuntimeEngine(bundle, threads, provider=Provider(entries=AS_WRITTEN | RESTS)))

    def logits(self, text: Text, first: int = 0) -> Logits:
        """[T - first, V] of the rows from `first` on."""
        return causal_logits(self.engine, [text.token_ids], text.source, first)[0]

    def tree_logits(self, history: Sequence[int], tree: DraftTree, source: Source = None) -> Logits:
        """[1 + N, V] of a tree after `history`, whose last token is the root."""
        return tree_logits(self.engine, history, tree, source)


def engine_precision(engine: Engine) -> str:
    """The row of LIMITS for the graphs that this engine computes."""
    quantization = engine.bundle.manifest.quantization
    # The canonical graph rounds to fixed scales then, and values at the edge of two integers may fall on either side.
    fixed = quantization.get("activations") == "static" or quantization.get("kv_cache") == "int8"
    if engine.built is None:  # ONNX Runtime itself multiplies integers where it finds quantized weights
        return precision_of(engine.model.dtype, fixed or "weights" in quantization, quantization.get("weights", ""))
    info = engine.built[0]
    integers = fixed or bool(info.passes.get("integer_products"))
    return precision_of(info.settings.get("precision", engine.model.dtype), integers, quantization.get("weights", ""))


def spread_of(logits: Logits) -> Logits:
    """[...] the logit range of each row of [..., V]; never 0."""
    spread: Logits = np.maximum(np.ptp(logits, axis=-1), np.finfo(np.float32).tiny)
    return spread

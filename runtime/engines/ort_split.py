"""A decoder on the CPU whose LM head is a graph of its own (see `exporter.lowering.lm_head`)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.graph import HostOutputs, HostScores
from headstart.runtime.states import CrossState, GraphState, State

from .ort_host import Arena, HostGraph
from .ort_session import host_value

KEPT_BINDINGS = 64  # one for each number of rows


class HostLmHead:
    """`hidden` to `logits`, with buffers that are bound once for each number of rows."""

    def __init__(self, session: Any, vocab_size: int) -> None:
        self._session, self._vocab_size = session, vocab_size
        self._arena = Arena()
        self._bound: dict[tuple[int, ...], tuple[Any, NDArray[np.float32], NDArray[np.float32]]] = {}
        self._version = 0

    def run(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """[B, R, H] to [B, R, V] float32, valid until the next run."""
        binding, hidden, logits = self._binding(rows.shape)
        hidden[...] = rows
        self._session.run_with_iobinding(binding)
        return logits

    def _binding(self, shape: tuple[int, ...]) -> tuple[Any, NDArray[np.float32], NDArray[np.float32]]:
        hidden = self._arena.view(contract.HIDDEN, shape, "float32")
        logits = self._arena.view(contract.LOGITS, (*shape[:2], self._vocab_size), "float32")
        if self._version != self._arena.version or len(self._bound) > KEPT_BINDINGS:
            self._bound, self._version = {}, self._arena.version  # the others keep buffers that were outgrown
        if shape not in self._bound:
            binding = self._session.io_binding()
            binding.bind_ortvalue_input(contract.HIDDEN, host_value(hidden))
            binding.bind_ortvalue_output(contract.LOGITS, host_value(logits))
            self._bound[shape] = binding, hidden, logits
        return self._bound[shape]


class HostSplitDecoder:
    """A `SplitDecoder` on the CPU provider: both graphs in each pass, or one of them."""

    def __init__(self, body: HostGraph, open_lm_head: Callable[[], HostLmHead]) -> None:
        self.name, self.info = body.name, body.info
        self._body, self._open = body, open_lm_head
        self._lm_head: HostLmHead | None = None

    def new_state(self, batch: int, slots: int, sources: CrossState | None = None) -> GraphState:
        return self._body.new_state(batch, slots, sources)

    def run(
        self,
        inputs: Mapping[str, NDArray[Any]],
        state: State | None = None,
        row_mask: NDArray[np.bool_] | None = None,
    ) -> HostOutputs:
        outputs = self.run_body(inputs, state, row_mask)
        chosen = inputs[contract.OUTPUT_ROWS][..., None]
        rows = np.take_along_axis(outputs.arrays[contract.HIDDEN], chosen, axis=1)
        return HostOutputs({**outputs.arrays, contract.LOGITS: self._logits(rows)})

    def run_body(
        self,
        inputs: Mapping[str, NDArray[Any]],
        state: State | None = None,
        row_mask: NDArray[np.bool_] | None = None,
    ) -> HostOutputs:
        body = {name: array for name, array in inputs.items() if name != contract.OUTPUT_ROWS}
        return self._body.run(body, state, row_mask)

    def score(self, hidden: NDArray[np.float32]) -> HostScores:
        return HostScores(self._logits(hidden[None])[0])

    def _logits(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._lm_head is None:
            self._lm_head = self._open()
        return self._lm_head.run(rows)

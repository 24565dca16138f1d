"""Tensors in the host's memory: numpy arrays that ONNX Runtime reads and writes where they lie.

Measured facts it relies on: `OrtValue.ortvalue_from_numpy` shares the array's memory; building an IO binding costs more
than a small model's layer; a single row takes another attention path than two, so one row is padded to two and every
row is computed the same way however many stand beside it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.cache import CrossState, KVCache
from headstart.runtime.engine import SLOT_STEP, HostOutput
from headstart.runtime.engines.step import StepInputs

MIN_ROWS = 2


class HostMemory:
    """Where the CPU provider's tensors lie."""

    def __init__(self, bundle: Bundle) -> None:
        self._manifest = bundle.manifest

    def new_cache(self, batch: int, slots: int, cross: CrossState | None) -> KVCache:
        return KVCache(self._manifest.caches, batch, slots + MIN_ROWS, self._manifest.model.dtype, cross)

    def binding(self, session: Any, cache: KVCache, rows: int, chosen: int) -> "HostBinding":
        """Made once for each cache, session and shape; the mask covers the used slots, where the graph reads no others."""
        cuts = _reads_used_slots(session)
        rows = rows if cuts and cache.batch > 1 else max(rows, MIN_ROWS)
        key = (id(session), rows, chosen)
        if key not in cache.engine_state:
            cache.engine_state[key] = HostBinding(session, self._manifest.model, cache, rows, chosen)
        kept: HostBinding = cache.engine_state[key]
        if cuts:
            used = int(cache.lengths.max()) + rows
            kept.use(min(-(-used // SLOT_STEP) * SLOT_STEP, cache.slots))
        return kept

    def run(self, session: Any, wanted: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """One pass of a graph that keeps no cache."""
        found: list[NDArray[Any]] = session.run(list(wanted), dict(inputs))
        return found

    def widened(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        return stored.astype(np.float32, copy=False)


class HostBinding:
    """The buffers of one shape (B, T, R), bound once to a session and a cache."""

    def __init__(self, session: Any, model: Any, cache: KVCache, rows: int, chosen: int) -> None:
        batch = cache.batch
        self.inputs = StepInputs(batch, rows, chosen, cache.slots)
        self.outputs: dict[str, NDArray[Any]] = {
            contract.LOGITS: np.zeros((batch, chosen, model.vocab_size), model.dtype),
            contract.HIDDEN: np.zeros((batch, rows, model.hidden_size), model.dtype),
        }
        if model.aux_layers:
            width = model.hidden_size * len(model.aux_layers)
            self.outputs[contract.AUX_HIDDEN] = np.zeros((batch, rows, width), model.dtype)
        self._session, self._binding = session, _bind(session, self.inputs.arrays, self.outputs, cache)
        self._slots = cache.slots

    def use(self, slots: int) -> None:
        """Bind a mask of `slots` columns; the buffers stay."""
        if slots != self._slots:
            import onnxruntime as ort

            mask = ort.OrtValue.ortvalue_from_numpy(self.inputs.use(slots))
            self._binding.bind_ortvalue_input(contract.ATTENTION_MASK, mask)
            self._slots = slots

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def output(self, rows: int, chosen: int) -> HostOutput:
        """Of the first `rows` rows; views of the buffers where these are float32."""
        aux = self.outputs.get(contract.AUX_HIDDEN)
        return HostOutput(
            self.outputs[contract.LOGITS].astype(np.float32, copy=False),
            self.outputs[contract.HIDDEN][:, :rows].astype(np.float32, copy=False),
            None if aux is None else aux[:, :rows].astype(np.float32, copy=False),
        )


def _reads_used_slots(session: Any) -> bool:
    """Whether the graph's mask has a size of its own, see the exporter's `used_slots`."""
    masks = [node.shape for node in session.get_inputs() if node.name == contract.ATTENTION_MASK]
    return bool(masks) and masks[0][3] == contract.USED_SLOTS


def _bind(session: Any, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]], cache: KVCache) -> Any:
    import onnxruntime as ort

    value = ort.OrtValue.ortvalue_from_numpy
    binding = session.io_binding()
    wanted = {node.name for node in session.get_inputs()}
    for name, array in inputs.items():
        if name in wanted:
            binding.bind_ortvalue_input(name, value(array))
    for name, array in outputs.items():
        binding.bind_ortvalue_output(name, value(array))
    for name, buffer in zip(cache.names, cache.buffers, strict=True):
        shared = value(buffer)  # one buffer in and out: the scatter happens in place
        binding.bind_ortvalue_input(name, shared)
        binding.bind_ortvalue_output(contract.updated(name), shared)
    if cache.cross is not None:
        for name, buffer in zip(cache.cross.names, cache.cross.buffers, strict=True):
            binding.bind_ortvalue_input(name, value(buffer))
        binding.bind_ortvalue_input(contract.ENCODER_MASK, value(cache.cross.mask))
    return binding

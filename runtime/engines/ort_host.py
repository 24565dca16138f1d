"""Graphs in the host's memory: numpy arrays that ONNX Runtime reads and writes where they lie.

Measured facts it relies on: `OrtValue.ortvalue_from_numpy` shares the array's memory; building an IO binding costs more
than a small model's layer; a single row takes another attention path than two, so one row is padded to two and every
row is computed the same way however many others the pass has.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import GraphInfo, TensorInfo
from headstart.runtime.graph import HostOutputs
from headstart.runtime.host_memory import HostSources, RecurrentMemory, SlotMemory, SourceView
from headstart.runtime.states import CrossState, GraphState, State, StateMemory

from .ort_session import MIN_ROWS, Opened, host_value
from .sources import axis_size
from .step import StepInputs, measured_sizes, plain_outputs, trimmed


class Arena:
    """Memory for a graph's outputs: one buffer per output, of which every shape is a view.

    Attributes:
        version: counts new buffers, so that what was bound to old ones is known to be stale.
    """

    def __init__(self) -> None:
        self.version = 0
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def view(self, name: str, shape: Sequence[int], dtype: str) -> NDArray[Any]:
        """Grown when it is too small; the old buffer goes when nothing is bound to it any more."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if name not in self._buffers or self._buffers[name].nbytes < nbytes:
            self._buffers[name] = np.zeros(nbytes, np.uint8)
            self.version += 1
        return self._buffers[name][:nbytes].view(dtype).reshape(shape)


class HostGraph:
    """A `Graph` on the CPU provider."""

    def __init__(self, name: str, info: GraphInfo, open_form: Callable[[int], Opened]) -> None:
        """`open_form`: number of sequences -> the session for them."""
        self.name, self.info = name, info
        self._open, self._arena = open_form, Arena()

    def new_state(self, batch: int, slots: int, sources: CrossState | None = None) -> GraphState:
        info = self._open(batch).info
        slots += MIN_ROWS  # a padded row is written after the last real one
        parts: list[StateMemory] = []
        if info.slots:
            parts.append(SlotMemory.empty(info.slots, batch, slots))
        if info.recurrent:
            parts.append(RecurrentMemory.empty(info.recurrent, batch))
        memory = HostSources(batch) if info.reads else None
        state = GraphState(parts, np.zeros(batch, np.int64), slots, self.new_state, memory)
        return state.reading(sources)

    def run(
        self,
        inputs: Mapping[str, NDArray[Any]],
        state: State | None = None,
        row_mask: NDArray[np.bool_] | None = None,
    ) -> HostOutputs:
        if state is None:
            return self._run_once(inputs)
        assert isinstance(state, GraphState)
        opened = self._open(state.batch)
        sizes = measured_sizes(opened.steps, inputs)
        binding = self._binding(opened, state, sizes)
        binding.inputs.fill(inputs, state.lengths, row_mask)
        binding.run()
        return binding.outputs(sizes)

    def _run_once(self, inputs: Mapping[str, NDArray[Any]]) -> HostOutputs:
        """A pass of a graph without a state: its outputs' sizes are ONNX Runtime's business."""
        opened = self._open(1)
        measured_sizes(opened.steps, inputs)
        kinds = {tensor.name: tensor.dtype for tensor in opened.info.inputs}
        feeds = {name: np.ascontiguousarray(array, kinds[name]) for name, array in inputs.items()}
        names = [tensor.name for tensor in plain_outputs(opened.info)]
        return HostOutputs(dict(zip(names, opened.session.run(names, feeds), strict=True)))

    def _binding(self, opened: Opened, state: GraphState, sizes: Mapping[str, int]) -> "HostBinding":
        """Made once for each session, shape and view of a state, and again where its slots or sources got new arrays."""
        padded = dict(sizes)
        if contract.ROWS in sizes:
            padded[contract.ROWS] = max(sizes[contract.ROWS], opened.least_rows)
        slots = _slots(state)
        if slots is not None:
            slots.reserve(int(state.lengths.max()) + padded.get(contract.ROWS, 1))
        sources = state.sources
        assert sources is None or isinstance(sources, (HostSources, SourceView))
        key = (id(opened), state.begin, state.batch, *sorted(padded.items()))
        versions = tuple(part.version for part in (slots, sources) if part is not None)
        binding: HostBinding | None = state.bound.get(key)
        if binding is None or binding.versions != versions:
            for stale in [other for other, bound in state.bound.items() if bound.versions != versions]:
                del state.bound[stale]  # each keeps the old arrays
            binding = state.bound[key] = HostBinding(opened, state, padded, self._arena, versions)
        return binding


class HostBinding:
    """The buffers of one shape, bound once to a session and a state."""

    def __init__(
        self, opened: Opened, state: GraphState, sizes: Mapping[str, int], arena: Arena, versions: tuple[int, ...]
    ) -> None:
        """`versions`: of the slots' and the sources' arrays."""
        self.versions, self._opened, self._arena = versions, opened, arena
        slots = _slots(state)
        self._sizes = {contract.SLOTS: state.slots if slots is None else slots.slots, contract.BATCH: state.batch, **sizes}
        self.inputs = StepInputs(opened.steps, self._sizes)
        self._binding = opened.session.io_binding()
        self._inputs = {tensor.name for tensor in opened.info.inputs}
        self._outputs: dict[str, NDArray[Any]] = {}
        self._axes = {tensor.name: tensor.shape for tensor in plain_outputs(opened.info)}
        self._arena_version = -1
        self._recurrent: list[tuple[RecurrentMemory, dict[str, NDArray[Any]]]] = []
        self._bind(self.inputs.arrays)
        self._bind_state(state)

    def _bind(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        for name, array in arrays.items():
            if name in self._inputs:
                self._binding.bind_ortvalue_input(name, host_value(array))

    def _bind_state(self, state: GraphState) -> None:
        """Slots come in and go out in one buffer, so that they are updated in place; recurrent states come out by row."""
        for part in state.parts:
            if isinstance(part, SlotMemory):
                self._bind_slots(part)
            elif isinstance(part, RecurrentMemory):
                rows = part.new_rows(self._sizes[contract.ROWS])
                self._bind(part.arrays)
                for name, array in rows.items():
                    self._binding.bind_ortvalue_output(contract.updated(name), host_value(array))
                self._recurrent.append((part, rows))
        if isinstance(state.sources, (HostSources, SourceView)):
            self._bind(state.sources.bound())

    def _bind_slots(self, part: SlotMemory) -> None:
        for name, array in part.arrays.items():
            if name in self._inputs:  # a graph of the first layers has fewer
                shared = host_value(array)
                self._binding.bind_ortvalue_input(name, shared)
                self._binding.bind_ortvalue_output(contract.updated(name), shared)

    def _bind_outputs(self) -> None:
        """Views of the arena, which every shape shares; bound again when it has grown."""
        tensors = plain_outputs(self._opened.info)
        self._outputs = {t.name: self._arena.view(t.name, self._shape(t), t.dtype) for t in tensors}
        for name, array in self._outputs.items():
            self._binding.bind_ortvalue_output(name, host_value(array))
        self._arena_version = self._arena.version

    def _shape(self, tensor: TensorInfo) -> tuple[int, ...]:
        return tuple(axis_size(axis, self._sizes) for axis in tensor.shape)

    def run(self) -> None:
        if self._arena_version != self._arena.version:
            self._bind_outputs()
        self._opened.session.run_with_iobinding(self._binding)
        for part, rows in self._recurrent:
            part.returned(rows)

    def outputs(self, sizes: Mapping[str, int]) -> HostOutputs:
        """Without padding: views of the arena."""
        return HostOutputs({name: trimmed(array, self._axes[name], sizes) for name, array in self._outputs.items()})


def _slots(state: GraphState) -> SlotMemory | None:
    return next((part for part in state.parts if isinstance(part, SlotMemory)), None)

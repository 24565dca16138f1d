"""Graphs on a device, for every library that runs them: tensors at addresses, passes of padded sizes, states, lazy outputs.

A pass goes up in one copy (`step`), runs at addresses that stay where they are, so that CUDA graphs can be replayed, and its
outputs are copied to the host when they are read. A commit moves slots on the device. ONNX Runtime and TensorRT differ in
their implementations of two protocols: `DeviceMemory` (`ort_device`, `trt_memory`) and `Executor` (`ort_device`,
`trt_plans`).

HAS NOT BEEN RUN ON A GPU YET: tests run it on the CPU provider, and over stand-ins for TensorRT's device and plans.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import GraphInfo, KeyValueInfo, TensorInfo
from headstart.runtime.errors import EngineError
from headstart.runtime.graph import HostOutputs, Outputs, as_float32
from headstart.runtime.states import CrossState, GraphState, State, moves

from .buckets import Pass
from .sources import axis_size, filled
from .step import StepInputs, measured_sizes, plain_outputs, source_names, state_names, step_inputs, trimmed


@dataclass(frozen=True)
class Tensor:
    """An array on the device.

    Attributes:
        address: of its first byte.
        dtype: numpy's name, or bfloat16.
        block: what its memory keeps of it: the allocation that it lies in.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    block: Any = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def rows(self, begin: int, count: int) -> "Tensor":
        """A part of the outermost axis."""
        step = self.nbytes // self.shape[0]
        return dataclasses.replace(self, address=self.address + begin * step, shape=(count, *self.shape[1:]))

    def flat(self) -> "Tensor":
        """[rows, width]: all axes but the last are one."""
        return dataclasses.replace(self, shape=(int(np.prod(self.shape[:-1])), self.shape[-1]))


class DeviceMemory(Protocol):
    """Allocations and copies. Everything happens in the order in which it was asked for; only `read` waits.

    Attributes:
        partial: part of an allocation can be read at that part's cost; else the whole of it is copied each time.
    """

    partial: bool

    def tensors(self, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Tensor]:
        """Name -> a tensor of that shape and type, all zeros: what is masked must still be finite.

        Raises EngineError where there is no room.
        """
        ...

    def free(self, tensors: Mapping[str, Tensor]) -> None:
        """Give back what one call of `tensors` returned."""
        ...

    def write(self, tensor: Tensor, array: NDArray[Any]) -> None: ...

    def read(self, tensor: Tensor) -> NDArray[Any]: ...


class SlotMoves(Protocol):
    """Moves of key/value slots, on the device; tensors are [B, G, S, D] by name."""

    def move(self, tensors: Mapping[str, Tensor], moved: Sequence[tuple[int, int]]) -> None:
        """(from, to) slots of one sequence, as `states.moves` orders them."""
        ...

    def gather(self, tensors: Mapping[str, Tensor], rows: Sequence[int]) -> None:
        """Sequence i becomes what sequence `rows[i]` was."""
        ...


class Executor(Protocol):
    """A compiled graph.

    Attributes:
        info: the manifest's description with the types and tensors that the compiled graph has.
    """

    info: GraphInfo

    def passes(self, rows: int, chosen: int, batch: int) -> list[Pass]:
        """The passes that so many rows take."""
        ...

    def run(self, profile: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], replay: bool) -> None:
        """Start one pass. `replay`: it will come again with these addresses, and may be recorded as a CUDA graph."""
        ...


class DeviceSlots:
    """Key/value slots on the device; see `states.StateMemory`."""

    def __init__(self, memory: DeviceMemory, mover: SlotMoves, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self._memory, self._mover = memory, mover

    def view(self, begin: int, count: int) -> "DeviceSlots":
        return DeviceSlots(self._memory, self._mover, self._rows(begin, count))

    def _rows(self, begin: int, count: int) -> dict[str, Tensor]:
        return {name: tensor.rows(begin, count) for name, tensor in self.tensors.items()}

    def commit(self, row: int, start: int, kept: Sequence[int]) -> None:
        moved = moves(start, kept)
        if moved:
            self._mover.move(self._rows(row, 1), moved)

    def gather(self, rows: Sequence[int], used: int) -> None:
        self._mover.gather(self.tensors, rows)

    def rewind(self, row: int, length: int) -> None:
        """No-op: slots after the length are free, whatever they hold."""

    def save(self, row: int, length: int) -> list[NDArray[Any]]:
        """On the host."""
        return [self._memory.read(tensor)[0, :, :length].copy() for tensor in self._rows(row, 1).values()]

    def load(self, row: int, saved: Sequence[NDArray[Any]]) -> None:
        for tensor, copy in zip(self._rows(row, 1).values(), saved, strict=True):
            whole = self._memory.read(tensor)
            whole[0, :, : copy.shape[1]] = copy
            self._memory.write(tensor, whole)


class DeviceSources:
    """The sources of B sequences on the device, padded to the longest.

    Attributes:
        tensors: input -> [B, …]; empty until the first source is put.
    """

    def __init__(self, memory: DeviceMemory, kinds: Mapping[str, str], batch: int, kept: dict[int, dict[str, Tensor]]) -> None:
        """`kinds`: input -> type. `kept`: tensors by source length, which outlive the state for the next of its size."""
        self.batch = batch
        self.tensors: dict[str, Tensor] = {}
        self._memory, self._kinds, self._kept = memory, kinds, kept
        self._put: set[int] = set()

    def view(self, begin: int, count: int) -> "DeviceSourceView":
        return DeviceSourceView(self, begin, count)

    def rows(self, begin: int, count: int) -> dict[str, Tensor]:
        return {name: tensor.rows(begin, count) for name, tensor in self.tensors.items()}

    def put(self, row: int, sources: CrossState) -> None:
        given = dict(zip(sources.names, sources.buffers, strict=True)) | {contract.ENCODER_MASK: sources.mask}
        length, present = sources.mask.shape[1], self._length()
        if length > present or (self.batch == 1 and length != present):
            self._lengthen(given, length)
        length = self._length()
        for name, tensor in self.tensors.items():
            axis = 1 if name == contract.ENCODER_MASK else 2
            self._memory.write(tensor.rows(row, 1), filled(given[name], axis, length))
        self._put.add(row)

    def _length(self) -> int:
        return self.tensors[contract.ENCODER_MASK].shape[1] if self.tensors else 0

    def _lengthen(self, given: Mapping[str, NDArray[Any]], length: int) -> None:
        """Tensors for sources of that length, with the contents of the shorter ones."""
        others = {} if self.batch == 1 else {row: self.row(row) for row in self._put}
        if length not in self._kept:
            self._kept[length] = self._memory.tensors(
                {name: ((self.batch, *array.shape[1:]), self._kinds[name]) for name, array in given.items()}
            )
            mask = np.zeros((self.batch, length), np.bool_)
            mask[:, 0] = True  # a sequence that sees nothing would be 0/0, and its slots would hold that for long
            self._memory.write(self._kept[length][contract.ENCODER_MASK], mask)
        self.tensors = self._kept[length]
        for row, source in others.items():
            assert source is not None
            self.put(row, source)

    def row(self, row: int) -> CrossState | None:
        if row not in self._put:
            return None
        arrays = {name: self._memory.read(tensor.rows(row, 1)) for name, tensor in self.tensors.items()}
        mask = arrays.pop(contract.ENCODER_MASK)
        return CrossState(tuple(arrays), tuple(arrays.values()), mask, np.zeros((1, mask.shape[1], 0)))


@dataclass(frozen=True)
class DeviceSourceView:
    """The sources of some sequences; see DeviceSources."""

    whole: DeviceSources
    begin: int
    count: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.whole.rows(self.begin, self.count)

    def view(self, begin: int, count: int) -> "DeviceSourceView":
        return DeviceSourceView(self.whole, self.begin + begin, count)

    def put(self, row: int, sources: CrossState) -> None:
        self.whole.put(self.begin + row, sources)

    def row(self, row: int) -> CrossState | None:
        return self.whole.row(self.begin + row)


@dataclass(frozen=True)
class Storage:
    """One state's memory. Outlives the state, for the next of its size: what was captured stays good."""

    slots: dict[str, Tensor]
    sources: dict[int, dict[str, Tensor]]  # by length of the sources


class StatePool:
    """The states of one graph: memory that is taken back when a state is gone, and given out again before any is allocated."""

    def __init__(self, info: GraphInfo, memory: DeviceMemory, mover: SlotMoves, room: Callable[[int, int], int]) -> None:
        """`room`: (sequences, slots wanted) -> slots given; raises EngineError for more than there is."""
        self._info, self._memory, self._mover, self._room = info, memory, mover, room
        self._idle: dict[tuple[int, int], list[Storage]] = {}
        self._kinds = {name: pair.dtype for pair in info.reads for name in pair.sizes()} | {contract.ENCODER_MASK: "bool"}

    def open(self, batch: int, slots: int) -> GraphState:
        slots = self._room(batch, slots)
        idle = self._idle.setdefault((batch, slots), [])
        storage = idle.pop() if idle else self._new_storage(batch, slots)
        sources = DeviceSources(self._memory, self._kinds, batch, storage.sources) if self._info.reads else None
        parts = [DeviceSlots(self._memory, self._mover, storage.slots)]
        state = GraphState(parts, np.zeros(batch, np.int64), slots, self.open, sources)
        weakref.finalize(state, idle.append, storage)
        return state

    def _new_storage(self, batch: int, slots: int) -> Storage:
        """Idle memory of other sizes is given up where there is no room. Raises EngineError when that is not enough."""
        shapes = slot_shapes(self._info.slots, batch, slots)
        try:
            return Storage(self._memory.tensors(shapes), {})
        except EngineError:
            for storages in self._idle.values():
                for storage in storages:
                    for tensors in (storage.slots, *storage.sources.values()):
                        self._memory.free(tensors)
                storages.clear()
        try:
            return Storage(self._memory.tensors(shapes), {})
        except EngineError as error:
            raise EngineError(
                f"The device has no room for states of {batch} x {slots} tokens: {error} Fix: a shorter text, or fewer at once."
            ) from error


def slot_shapes(infos: Sequence[KeyValueInfo], batch: int, slots: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor -> its shape and type."""
    return {name: ((batch, info.kv_heads, slots, size), info.dtype) for info in infos for name, size in info.sizes().items()}


class OutputMemory:
    """Where a graph's passes leave their outputs: one buffer each for all shapes where parts can be read, else one a shape."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._kept: dict[tuple[Any, ...], dict[str, Tensor]] = {}

    def tensors(self, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Tensor]:
        if not self._memory.partial:
            return self._of(tuple(shapes.items()), shapes)
        return {name: self._part(name, *shape) for name, shape in shapes.items()}

    def _of(self, key: tuple[Any, ...], shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Tensor]:
        if key not in self._kept:
            self._kept[key] = self._memory.tensors(shapes)
        return self._kept[key]

    def _part(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        wanted = Tensor(0, shape, dtype)
        if (name,) in self._kept and self._kept[(name,)][name].nbytes < wanted.nbytes:
            self._memory.free(self._kept.pop((name,)))
        whole = self._of((name,), {name: (shape, dtype)})[name]
        return dataclasses.replace(wanted, address=whole.address, block=whole.block)


class DeviceOutputs:
    """`Outputs` on the device: each is copied to the host when it is read."""

    def __init__(
        self,
        memory: DeviceMemory,
        tensors: Mapping[str, Tensor],
        axes: Mapping[str, Sequence[int | str]],
        sizes: Mapping[str, int],
    ) -> None:
        """`sizes`: axis -> what was asked for, of the padded sizes that were computed."""
        self._memory, self._tensors, self._axes, self._sizes = memory, tensors, axes, sizes
        self._read: dict[str, NDArray[Any]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> NDArray[Any]:
        return as_float32(self.stored(name))

    def stored(self, name: str) -> NDArray[Any]:
        """As the device has it: floats in its precision."""
        if name not in self._read:
            self._read[name] = self._memory.read(self._tensors[name])
        return trimmed(self._read[name], self._axes[name], self._sizes)

    def scores(self, sequence: int) -> "DeviceScores":
        return DeviceScores(self, sequence)

    def rows(self, name: str, sequence: int, rows: Sequence[int]) -> NDArray[np.float32]:
        count = self._sizes[contract.CHOSEN if contract.CHOSEN in self._axes[name] else contract.ROWS]
        places = [row % count for row in rows]
        if not self._memory.partial or name in self._read:
            copy: NDArray[np.float32] = self[name][sequence][places]
            return copy
        tensor, first = self._tensors[name], min(places)
        span = tensor.flat().rows(sequence * tensor.shape[1] + first, max(places) - first + 1)
        found: NDArray[np.float32] = as_float32(self._memory.read(span))[[place - first for place in places]]
        return found

    def wait(self) -> None:
        """Fetches the best tokens, which greedy decoding reads next anyway; or the first output."""
        self.stored(contract.BEST_IDS if contract.BEST_IDS in self._tensors else next(iter(self._tensors)))

    def fetched(self) -> HostOutputs:
        """All of it, before another pass overwrites it."""
        return HostOutputs({name: self.stored(name) for name in self._tensors})


@dataclass(frozen=True)
class DeviceScores:
    """Scores of one sequence, see `graph.Scores`."""

    outputs: DeviceOutputs
    sequence: int

    def best(self, row: int) -> int:
        if contract.BEST_IDS not in self.outputs:
            return int(self[row].argmax())
        return int(self.outputs.stored(contract.BEST_IDS)[self.sequence, row])

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.outputs.rows(contract.LOGITS, self.sequence, [row])[0]
        return found


class DeviceGraph:
    """A `Graph` on a device."""

    def __init__(
        self,
        name: str,
        info: GraphInfo,
        executor: Executor,
        memory: DeviceMemory,
        mover: SlotMoves,
        room: Callable[[int, int], int],
        once: bool = False,
    ) -> None:
        """`once`: it runs once a source, in sizes that seldom come again: its tensors live for one pass.

        Raises EngineError for a graph with a recurrent state.
        """
        if info.recurrent:
            raise EngineError(f"The graph {name} keeps a recurrent state, which only the cpu engine keeps. Fix: --device cpu.")
        self.name, self.info, self.executor = name, info, executor
        self._memory, self._once = memory, once
        self._inputs = step_inputs(executor.info)
        self._slots = state_names(executor.info)
        self._kept = self._slots | source_names(executor.info)
        self._states = StatePool(executor.info, memory, mover, room)
        self._outputs = OutputMemory(memory)
        self._steps: dict[tuple[Any, ...], tuple[StepInputs, dict[str, Tensor]]] = {}
        self._prompts = OutputMemory(memory)  # the inputs of prompts, of any length
        self._axes = {tensor.name: tensor.shape for tensor in plain_outputs(executor.info)}

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Allocate outputs for the largest pass, so that no address changes later."""
        self._outputs.tensors(self._output_shapes(sizes))

    def reserve_prompts(self, sizes: Mapping[str, int]) -> None:
        """Allocate inputs for the longest prompt."""
        nbytes = StepInputs(self._inputs, sizes).data.nbytes
        self._prompts.tensors({"inputs": ((nbytes,), "uint8")})

    def new_state(self, batch: int, slots: int, sources: CrossState | None = None) -> GraphState:
        state = self._states.open(batch, slots)
        return state.reading(sources)

    def run(
        self,
        inputs: Mapping[str, NDArray[Any]],
        state: State | None = None,
        row_mask: NDArray[np.bool_] | None = None,
    ) -> Outputs:
        assert state is None or isinstance(state, GraphState)
        sizes = measured_sizes(self._inputs, inputs)
        if contract.ROWS not in sizes:
            whole = Pass(0, 0, 0, 0)
            return self._run(whole, inputs, sizes, state, None)
        rows, chosen = sizes[contract.ROWS], sizes.get(contract.CHOSEN, sizes[contract.ROWS])
        parts = self.executor.passes(rows, chosen, sizes[contract.BATCH])
        if len(parts) == 1:
            return self._run(parts[0], inputs, sizes, state, row_mask)
        found = []
        for part in parts:
            given = dict(inputs) | _chosen_of(part, inputs, sizes)
            count = part.end - part.begin
            asked = sizes | {contract.ROWS: count, contract.CHOSEN: 1 if part.prompt else count}
            outputs = self._run(part, given, asked, state, row_mask)
            assert isinstance(outputs, DeviceOutputs)
            found.append(outputs.fetched())
        return HostOutputs({name: _joined(name, axes, parts, found, inputs) for name, axes in self._axes.items()})

    def _run(
        self,
        part: Pass,
        inputs: Mapping[str, NDArray[Any]],
        sizes: Mapping[str, int],
        state: GraphState | None,
        row_mask: NDArray[np.bool_] | None,
    ) -> "DeviceOutputs | HostOutputs":
        """One pass. `sizes`: as asked for, before padding."""
        padded = dict(sizes)
        if part.padded:
            padded |= {contract.ROWS: part.padded, contract.CHOSEN: part.chosen}
        if state is not None:
            padded[contract.SLOTS] = state.slots
        step, sent = self._step(padded, part.prompt)
        step.fill(inputs, np.zeros(0, np.int64) if state is None else state.lengths, row_mask, part.begin, part.end or None)
        self._memory.write(sent["inputs"], step.data)
        given = step_tensors(step, sent["inputs"]) | self._state_tensors(state)
        returned = self._new_outputs(padded)
        updated = {contract.updated(name): tensor for name, tensor in given.items() if name in self._slots}
        replay = part.replayed and (state is None or state.begin == 0)
        self.executor.run(part.profile, given, returned | updated, replay)
        outputs = DeviceOutputs(self._memory, returned, self._axes, sizes)
        if not self._once:
            return outputs
        fetched = outputs.fetched()
        for tensors in (sent, returned):
            self._memory.free(tensors)
        return fetched

    def _step(self, sizes: Mapping[str, int], prompt: bool) -> tuple[StepInputs, dict[str, Tensor]]:
        """The inputs' buffer on the host and on the device: one of each shape that comes again, one for all prompts."""
        key = tuple(sorted(sizes.items()))
        if key in self._steps:
            return self._steps[key]
        step = StepInputs(self._inputs, sizes)
        shapes = {"inputs": ((step.data.nbytes,), "uint8")}
        if self._once:
            return step, self._memory.tensors(shapes)
        if prompt and self._memory.partial:
            return step, self._prompts.tensors(shapes)
        self._steps[key] = step, self._memory.tensors(shapes)
        return self._steps[key]

    def _state_tensors(self, state: GraphState | None) -> dict[str, Tensor]:
        """What the graph reads of a state and of its sources."""
        if state is None:
            return {}
        holders = [*state.parts, *([] if state.sources is None else [state.sources])]
        found: dict[str, Tensor] = {}
        for holder in holders:
            assert isinstance(holder, (DeviceSlots, DeviceSources, DeviceSourceView))
            found |= {name: tensor for name, tensor in holder.tensors.items() if name in self._kept}
        return found

    def _new_outputs(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        shapes = self._output_shapes(sizes)
        return self._memory.tensors(shapes) if self._once else self._outputs.tensors(shapes)

    def _output_shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[tuple[int, ...], str]]:
        return {t.name: (_shape(t, sizes), t.dtype) for t in plain_outputs(self.executor.info)}


def _shape(tensor: TensorInfo, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(axis_size(axis, sizes) for axis in tensor.shape)


def step_tensors(step: StepInputs, sent: Tensor) -> dict[str, Tensor]:
    """Input -> where it lies in the buffer that was sent."""
    return {
        name: dataclasses.replace(
            sent, address=sent.address + offset, shape=step.arrays[name].shape, dtype=step.tensors[name].dtype
        )
        for name, offset in step.offsets.items()
    }


def _chosen_of(part: Pass, inputs: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """The chosen rows of one pass of several: all of them, or in a prompt the nearest to the one that was asked for."""
    if contract.OUTPUT_ROWS not in inputs:
        return {}
    count = part.end - part.begin
    nearest = np.clip(inputs[contract.OUTPUT_ROWS] - part.begin, 0, count - 1)
    return {contract.OUTPUT_ROWS: nearest if part.prompt else np.arange(count)[None].repeat(sizes[contract.BATCH], 0)}


def _joined(
    name: str,
    axes: Sequence[int | str],
    parts: Sequence[Pass],
    found: Sequence[HostOutputs],
    inputs: Mapping[str, NDArray[Any]],
) -> NDArray[Any]:
    """One output of several passes: long texts whose every row is wanted, or prompts longer than a pass."""
    arrays = [outputs.arrays[name] for outputs in found]
    if contract.CHOSEN not in axes:
        return np.concatenate(arrays, axis=axes.index(contract.ROWS))
    axis, chosen = axes.index(contract.CHOSEN), inputs[contract.OUTPUT_ROWS]
    if parts[0].prompt:
        row = int(chosen[0, 0])
        return next(array for part, array in zip(parts, arrays, strict=True) if part.begin <= row < part.end)
    whole = np.concatenate(arrays, axis=axis)
    return np.stack([whole[sequence][rows] for sequence, rows in enumerate(chosen)])

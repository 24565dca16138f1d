"""Tensors on a GPU, through ONNX Runtime alone: no CUDA package of Python's is needed.

A forward goes up in one copy; caches stay where they are, and are written in place. A commit moves slots with a small graph
of its own (`exporter.lowering.cache_moves`). Rows are padded to a few sizes, so that CUDA graphs can be replayed; what was
captured belongs to a cache's buffers, which therefore go to the next cache of their size.

Every line is run in tests on the CPU provider, with `location` "cpu". HAS NOT BEEN RUN ON A GPU YET.
"""

import ctypes
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, CacheInfo
from headstart.runtime.cache import CrossState, KVCache
from headstart.runtime.engine import MAX_ROWS
from headstart.runtime.engines.buckets import moves
from headstart.runtime.engines.half import STORED, narrowed, widened
from headstart.runtime.engines.provider import CaptureError
from headstart.runtime.engines.step import StepInputs
from headstart.runtime.errors import EngineError

ROWS = (2, 4, 8, 16, 32, MAX_ROWS)  # of a pass that verifies; prompts are not padded
SLOT_STEP = 256  # caches of a few sizes, so that buffers and what was captured on them serve again
# ONNX's numbers for element types.
ELEMENTS = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}


def padded(rows: int) -> int:
    """Rows of the pass that holds `rows`."""
    return next((size for size in ROWS if size >= rows), rows)


class Tensor:
    """An array on the device, zeros at first.

    Attributes:
        value: ONNX Runtime's; bfloat16 is kept as uint16, which numpy knows.
        kind: of the elements, as ONNX has it.
    """

    def __init__(self, shape: Sequence[int], kind: str, location: str) -> None:
        import onnxruntime as ort

        self.shape, self.kind = tuple(shape), kind
        self._host: NDArray[Any] = np.zeros(shape, STORED.get(kind, kind))  # kept: on the CPU it is the tensor itself
        self._row_bytes = self._host.nbytes // max(self.shape[0], 1)
        self._location = location
        self.value = ort.OrtValue.ortvalue_from_numpy(self._host, location, 0)
        if location != "cpu":
            self._host = np.zeros(0, self._host.dtype)

    def write(self, array: NDArray[Any]) -> None:
        self.value.update_inplace(np.ascontiguousarray(array))

    def read(self) -> NDArray[Any]:
        """As stored, copied."""
        found: NDArray[Any] = self.value.numpy()
        return found.copy() if self._location == "cpu" else found

    def place(
        self, row: int | None = None, offset: int = 0, part: "tuple[Sequence[int], str] | None" = None
    ) -> tuple[Any, ...]:
        """What a binding wants to know: of the whole, of one row of the outermost axis, or of a `part` (shape, kind)."""
        shape, kind = part or (self.shape if row is None else (1, *self.shape[1:]), self.kind)
        address = self.value.data_ptr() + offset + (row or 0) * self._row_bytes
        return self._location, 0, ELEMENTS[kind], list(shape), address


class Storage:
    """One cache's tensors, and what was bound to them. Outlives the cache, for the next of its size.

    Attributes:
        tensors: key and value of each layer in turn.
        sources: cross-attention states by shape, and whose they are at present.
        bound: bindings by session and shape.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.sources: dict[Any, tuple[dict[str, Tensor], CrossState]] = {}
        self.bound: dict[Any, Any] = {}


class DeviceCache(KVCache):
    """The caches of B sequences on the device."""

    def __init__(
        self, memory: "DeviceMemory", names: list[str], storage: Storage, batch: int, cross: CrossState | None
    ) -> None:
        self.names, self.storage, self.cross = names, storage, cross
        self.lengths = np.zeros(batch, np.int64)
        self.buffers, self.engine_state = [], {}
        self.row_index: int | None = None
        self._memory = memory
        self._whole: DeviceCache | None = None  # of a row: keeps the buffers from being given to another cache

    @property
    def slots(self) -> int:
        return int(self.storage.tensors[0].shape[2])

    def row(self, index: int) -> "DeviceCache":
        if self.batch == 1:
            return self
        cross = None if self.cross is None else self.cross.row(index)
        view = DeviceCache(self._memory, self.names, self.storage, 1, cross)
        view.lengths, view.row_index, view._whole = self.lengths[index : index + 1], index, self
        return view

    def commit(self, row: int, kept: Sequence[int]) -> None:
        pairs = moves(int(self.lengths[row]), kept)
        if pairs:
            index = row if self.batch > 1 else self.row_index
            self._memory.move(self, index, [source for source, _ in pairs], pairs[0][1])
        self.lengths[row] += len(kept)

    def gather(self, rows: Sequence[int]) -> None:
        if list(rows) != list(range(self.batch)):
            self._memory.gather(self, rows)
            self.lengths[:] = self.lengths[list(rows)]


class DeviceMemory:
    """Where a provider's tensors lie, when that is not the host's memory."""

    def __init__(self, bundle: Bundle, precision: str, location: str, open_graph: Callable[[str], Any]) -> None:
        """`open_graph`: name of a graph of the engine -> its session; asked for "commit" and "gather" when those are needed."""
        self._manifest, self.precision, self.location, self._open = bundle.manifest, precision, location, open_graph
        self.capturing = False
        self._free: dict[tuple[int, int], list[Storage]] = {}
        self._graph_ids = itertools.count(1)

    def new_cache(self, batch: int, slots: int, cross: CrossState | None) -> KVCache:
        slots = -(-(slots + MAX_ROWS) // SLOT_STEP) * SLOT_STEP
        free = self._free.setdefault((batch, slots), [])
        storage = free.pop() if free else self._new_storage(batch, slots)
        names = [name for info in self._manifest.caches for name in (info.key_name, info.value_name)]
        cache = DeviceCache(self, names, storage, batch, cross)
        weakref.finalize(cache, free.append, storage)
        return cache

    def _new_storage(self, batch: int, slots: int) -> Storage:
        """Idle buffers of other sizes are given up where there is no room. Raises EngineError when that is not enough."""
        try:
            return Storage(self._tensors(batch, slots))
        except RuntimeError:
            for idle in self._free.values():
                idle.clear()
        try:
            return Storage(self._tensors(batch, slots))
        except RuntimeError as error:
            raise EngineError(
                f"The device has no room for caches of {batch} x {slots} tokens: {error}. "
                "Fix: a shorter text, or fewer at once."
            ) from error

    def _tensors(self, batch: int, slots: int) -> list[Tensor]:
        def pair(info: CacheInfo) -> list[Tensor]:
            kind = info.dtype or self.precision
            shapes = [(batch, info.kv_heads, slots, size) for size in (info.key_size, info.value_size)]
            return [Tensor(shape, kind, self.location) for shape in shapes]

        return [tensor for info in self._manifest.caches for tensor in pair(info)]

    def binding(self, session: Any, cache: KVCache, rows: int, chosen: int) -> "DeviceBinding":
        """Made once for each session, shape and source's shape."""
        assert isinstance(cache, DeviceCache)
        rows, chosen = padded(rows), chosen if chosen == 1 else padded(chosen)
        sources = self._sources(cache)
        shapes = tuple(tensor.shape for tensor in sources.values())
        key = session, rows, chosen, cache.row_index, shapes
        if key not in cache.storage.bound:
            captured = self.capturing and rows <= MAX_ROWS and cache.row_index is None
            graph_id = next(self._graph_ids) if captured else None
            cache.storage.bound[key] = DeviceBinding(
                self, session, self._manifest.model, cache, (rows, chosen), sources, graph_id
            )
        kept: DeviceBinding = cache.storage.bound[key]
        return kept

    def _sources(self, cache: DeviceCache) -> dict[str, Tensor]:
        """The cross-attention's inputs, sent up when they are another source's than last time."""
        cross = cache.cross
        if cross is None:
            return {}
        arrays = dict(zip(cross.names, cross.buffers, strict=True)) | {contract.ENCODER_MASK: cross.mask}
        key = cache.row_index, tuple(array.shape for array in arrays.values())
        tensors, present = cache.storage.sources.get(key, ({}, None))
        if present is not cross:
            for name, array in arrays.items():
                kind = "bool" if name == contract.ENCODER_MASK else self.precision
                tensors.setdefault(name, Tensor(array.shape, kind, self.location)).write(array)
            cache.storage.sources[key] = tensors, cross
        return tensors

    def move(self, cache: DeviceCache, row: int | None, sources: Sequence[int], target: int) -> None:
        """Copy slots `sources` of a sequence to `target` and the slots behind it. What is padded falls on free slots."""
        sources = [*sources, *[sources[-1]] * (padded(len(sources)) - len(sources))]
        inputs = {"slots": np.array(sources, np.int64), contract.WRITE_INDEX: np.array([target], np.int64)}
        self._rearrange("commit", cache, row, inputs)

    def gather(self, cache: DeviceCache, rows: Sequence[int]) -> None:
        """Sequence i becomes what sequence `rows[i]` was."""
        inputs = {"rows": np.array(rows, np.int64), contract.WRITE_INDEX: np.zeros(cache.batch, np.int64)}
        self._rearrange("gather", cache, None, inputs)

    def _rearrange(self, graph: str, cache: DeviceCache, row: int | None, inputs: Mapping[str, NDArray[np.int64]]) -> None:
        session = self._open(graph)
        key = session, row, tuple(array.shape for array in inputs.values())
        if key not in cache.storage.bound:
            tensors = {name: Tensor(array.shape, "int64", self.location) for name, array in inputs.items()}
            binding = session.io_binding()
            for name, tensor in tensors.items():
                binding.bind_input(name, *tensor.place())
            bind_caches(binding, cache, row)
            cache.storage.bound[key] = binding, tensors
        binding, tensors = cache.storage.bound[key]
        for name, array in inputs.items():
            tensors[name].write(array)
        session.run_with_iobinding(binding)

    def run(self, session: Any, wanted: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """One pass of a graph that keeps no cache: arrays in, arrays out as stored; floats go in as the graph takes them."""
        import onnxruntime as ort

        binding, kinds = session.io_binding(), {node.name: node.type for node in session.get_inputs()}
        for name, array in inputs.items():
            half = kinds[name].removeprefix("tensor(").removesuffix(")")
            stored = np.ascontiguousarray(narrowed(array, half) if half in STORED else array)
            kind = ELEMENTS[half if half in STORED else str(array.dtype)]
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy_with_onnx_type(stored, kind))
        for name in wanted:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        return [_stored(value) for value in binding.get_outputs()]

    def widened(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        return stored if stored.dtype == np.float32 else widened(stored, self.precision)


class DeviceBinding:
    """The tensors of one shape (B, T, R), bound once to a session and a cache."""

    def __init__(
        self,
        memory: DeviceMemory,
        session: Any,
        model: Any,
        cache: DeviceCache,
        shape: tuple[int, int],
        sources: Mapping[str, Tensor],
        graph_id: int | None,
    ) -> None:
        """`shape`: (T, R). `graph_id`: under which the pass is captured and replayed; None for neither."""
        (rows, chosen), batch, location = shape, cache.batch, memory.location
        self.inputs = StepInputs(batch, rows, chosen, cache.slots)
        self._sent = Tensor((self.inputs.data.nbytes,), "uint8", location)
        sizes = {contract.LOGITS: (chosen, model.vocab_size), contract.HIDDEN: (rows, model.hidden_size)}
        if model.aux_layers:
            sizes[contract.AUX_HIDDEN] = (rows, model.hidden_size * len(model.aux_layers))
        self._outputs = {name: Tensor((batch, *size), memory.precision, location) for name, size in sizes.items()}
        self._outputs[contract.BEST_IDS] = Tensor((batch, chosen), "int32", location)
        self._memory, self._session, self._sources, self._captured = memory, session, sources, graph_id is not None
        self._binding = self._bound(session, cache)
        self._options = _run_options(graph_id)

    def _bound(self, session: Any, cache: DeviceCache) -> Any:
        binding, wanted = session.io_binding(), {node.name for node in session.get_inputs()}
        for name, array in self.inputs.arrays.items():
            if name in wanted:
                part = array.shape, str(array.dtype)
                binding.bind_input(name, *self._sent.place(offset=self.inputs.offsets[name], part=part))
        for name, tensor in self._sources.items():
            binding.bind_input(name, *tensor.place())
        for name, tensor in self._outputs.items():
            binding.bind_output(name, *tensor.place())
        bind_caches(binding, cache, cache.row_index)
        return binding

    def run(self) -> None:
        """Raises CaptureError when a pass fails that was to be captured."""
        self._sent.write(self.inputs.data)
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # ONNX Runtime's errors have no common class below it
            if not self._captured:
                raise
            raise CaptureError(str(error)) from error

    def output(self, rows: int, chosen: int) -> "DeviceOutput":
        return DeviceOutput(self._memory, self._outputs, rows, chosen)


class DeviceOutput:
    """A `StepOutput` on the device: each of its tensors comes down when something of it is asked for."""

    def __init__(self, memory: DeviceMemory, tensors: Mapping[str, Tensor], rows: int, chosen: int) -> None:
        """`rows`, `chosen`: those that were asked for, of the padded ones that were computed."""
        self._memory, self._tensors, self._rows, self._chosen = memory, tensors, rows, chosen

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        return self._memory.widened(self._tensors[contract.LOGITS].read())[:, : self._chosen]

    @cached_property
    def hidden(self) -> NDArray[np.float32]:
        return self._memory.widened(self._tensors[contract.HIDDEN].read())[:, : self._rows]

    @cached_property
    def aux_hidden(self) -> NDArray[np.float32] | None:
        tensor = self._tensors.get(contract.AUX_HIDDEN)
        return None if tensor is None else self._memory.widened(tensor.read())[:, : self._rows]

    @cached_property
    def best_ids(self) -> NDArray[np.int32]:
        """[B, R]: the lowest token of each row's highest logit."""
        found: NDArray[np.int32] = self._tensors[contract.BEST_IDS].read()
        return found

    def scores(self, sequence: int) -> "DeviceScores":
        return DeviceScores(self, sequence)

    def hidden_row(self, sequence: int, row: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.hidden[sequence, row].copy()
        return found

    def wait(self) -> None:
        """A run returns when the device is done."""


@dataclass(frozen=True)
class DeviceScores:
    """Scores of one sequence, see `engine.Scores`."""

    output: DeviceOutput
    sequence: int

    def best(self, row: int) -> int:
        return int(self.output.best_ids[self.sequence, row])

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.output.logits[self.sequence, row]
        return found


def bind_caches(binding: Any, cache: DeviceCache, row: int | None) -> None:
    """A cache comes in and goes out at one place; of one sequence where `row` says which."""
    for name, tensor in zip(cache.names, cache.storage.tensors, strict=True):
        binding.bind_input(name, *tensor.place(row))
        binding.bind_output(contract.updated(name), *tensor.place(row))


def _run_options(graph_id: int | None) -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1" if graph_id is None else str(graph_id))
    return options


def _stored(value: Any) -> NDArray[Any]:
    """A tensor in the host's memory as an array; bfloat16 as uint16, which ONNX Runtime does not do itself."""
    if value.element_type() != ELEMENTS["bfloat16"]:
        found: NDArray[Any] = value.numpy()
        return found
    shape = tuple(value.shape())
    flat = (ctypes.c_uint16 * int(np.prod(shape))).from_address(value.data_ptr())
    copied: NDArray[Any] = np.ctypeslib.as_array(flat).reshape(shape).copy()
    return copied

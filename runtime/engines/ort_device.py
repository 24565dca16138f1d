"""ONNX Runtime's back end of the device layer: no CUDA package of Python's is needed.

A commit moves slots with a small graph of its own (`exporter.lowering.cache_moves`), for ONNX Runtime copies whole tensors
only. Rows are padded to a few sizes, so that CUDA graphs can be replayed.

Every line is run in tests on the CPU provider, with `location` "cpu". HAS NOT BEEN RUN ON A GPU YET.
"""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import GraphInfo
from headstart.runtime.errors import EngineError
from headstart.runtime.graph import MAX_ROWS

from .buckets import Pass
from .device import Tensor
from .ort_session import ELEMENTS, CaptureError, opened

ROWS = (2, 4, 8, 16, 32, MAX_ROWS)  # of a pass that verifies; longer prompts are not padded
SLOT_STEP = 256  # states of a few sizes, so that memory and what was captured on it serve again


def padded(rows: int) -> int:
    """Rows of the pass that holds `rows`."""
    return next((size for size in ROWS if size >= rows), rows)


def slots_given(batch: int, slots: int) -> int:
    """Slots of a state: what was asked for, and padded rows after the last real one."""
    return -(-(slots + MAX_ROWS) // SLOT_STEP) * SLOT_STEP


@dataclass(frozen=True)
class Block:
    """One allocation.

    Attributes:
        value: ONNX Runtime's tensor of bytes.
        host: the array that it was made of: on the CPU it is the memory itself.
    """

    value: Any
    host: NDArray[np.uint8] | None


class OrtMemory:
    """Where a provider's tensors lie: `location` is ONNX Runtime's name of it."""

    partial = False

    def __init__(self, location: str) -> None:
        self.location = location

    def tensors(self, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Tensor]:
        try:
            return {name: self._tensor(shape, dtype) for name, (shape, dtype) in shapes.items()}
        except RuntimeError as error:
            raise EngineError(f"{error}.") from error

    def _tensor(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        import onnxruntime as ort

        host = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize, np.uint8)
        value = ort.OrtValue.ortvalue_from_numpy(host, self.location, 0)
        return Tensor(value.data_ptr(), shape, dtype, Block(value, host if self.location == "cpu" else None))

    def free(self, tensors: Mapping[str, Tensor]) -> None:
        """No-op: an allocation is released with the last tensor in it."""

    def write(self, tensor: Tensor, array: NDArray[Any]) -> None:
        """Of a part of an allocation, the whole is read, changed and written."""
        block: Block = tensor.block
        data = np.ascontiguousarray(array, tensor.dtype).reshape(-1).view(np.uint8)
        if data.nbytes != block.value.tensor_size_in_bytes():
            whole = block.value.numpy().copy()
            begin = tensor.address - block.value.data_ptr()
            whole[begin : begin + data.nbytes] = data
            data = whole
        block.value.update_inplace(data)

    def read(self, tensor: Tensor) -> NDArray[Any]:
        whole: NDArray[np.uint8] = tensor.block.value.numpy()
        begin = tensor.address - tensor.block.value.data_ptr()
        array: NDArray[Any] = whole[begin : begin + tensor.nbytes].copy().view(tensor.dtype).reshape(tensor.shape)
        return array


class SessionExecutor:
    """A graph in ONNX Runtime's session, with its tensors bound; what was captured belongs to their addresses."""

    def __init__(
        self, name: str, info: GraphInfo, open_session: Callable[[bool], Any], location: str, captures: bool, keeps: bool = True
    ) -> None:
        """`open_session`: whether passes are captured -> the session. `keeps`: bindings serve again."""
        self._name, self._open, self._location, self._keeps = name, open_session, location, keeps
        self.captures = captures
        self._bound: dict[Any, tuple[Any, Any]] = {}
        self._graph_ids = itertools.count(1)
        try:
            self.session = open_session(captures)
        except CaptureError as error:
            self._stop_capturing(error)
        self.info = opened(self.session, info).info

    def passes(self, rows: int, chosen: int, batch: int) -> list[Pass]:
        """One, padded to the next of ROWS; only those are captured."""
        chosen = chosen if chosen == 1 else padded(chosen)
        return [Pass(0, 0, rows, padded(rows), chosen == 1 and rows > MAX_ROWS, chosen, replayed=rows <= MAX_ROWS)]

    def run(self, profile: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], replay: bool) -> None:
        """A pass that fails where it was to be captured is run again without."""
        captured = replay and self.captures
        key = (captured, *((name, t.address, t.shape) for name, t in (*inputs.items(), *outputs.items())))
        if key not in self._bound:
            if not self._keeps:
                self._bound.clear()
            self._bound[key] = self._binding(inputs, outputs), _run_options(next(self._graph_ids) if captured else None)
        try:
            self.session.run_with_iobinding(*self._bound[key])
        except Exception as error:  # ONNX Runtime's errors have no common class below it
            if not captured:
                raise
            self._stop_capturing(error)
            self.run(profile, inputs, outputs, replay)

    def _binding(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Any:
        binding = self.session.io_binding()
        wanted = {node.name for node in self.session.get_inputs()}
        for name, tensor in inputs.items():
            if name in wanted:
                binding.bind_input(name, *self._place(tensor))
        for name, tensor in outputs.items():
            binding.bind_output(name, *self._place(tensor))
        return binding

    def _place(self, tensor: Tensor) -> tuple[Any, ...]:
        return self._location, 0, ELEMENTS[tensor.dtype], list(tensor.shape), tensor.address

    def _stop_capturing(self, error: Exception) -> None:
        """Go on with a session that launches its kernels one by one."""
        text = f"CUDA graphs cannot be used with {self._name}, decoding goes on without: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
        self.captures = False
        self._bound.clear()
        self.session = self._open(False)


class GraphMoves:
    """Slot moves by graphs that gather and then scatter in place."""

    def __init__(self, memory: OrtMemory, open_moves: Callable[[str], SessionExecutor]) -> None:
        """`open_moves`: "commit" or "gather" -> its graph, opened when it is first needed."""
        self._memory, self._open = memory, open_moves
        self._executors: dict[str, SessionExecutor] = {}
        self._indices: dict[Any, dict[str, Tensor]] = {}

    def move(self, tensors: Mapping[str, Tensor], moved: Sequence[tuple[int, int]]) -> None:
        """Copies to the first target and the slots after it: targets are neighbours. Padding falls on free slots."""
        sources = [source for source, _ in moved]
        sources += [sources[-1]] * (padded(len(sources)) - len(sources))
        self._run("commit", tensors, {"slots": sources, contract.WRITE_INDEX: [moved[0][1]]})

    def gather(self, tensors: Mapping[str, Tensor], rows: Sequence[int]) -> None:
        self._run("gather", tensors, {"rows": rows, contract.WRITE_INDEX: [0] * len(rows)})

    def _run(self, graph: str, tensors: Mapping[str, Tensor], indices: Mapping[str, Sequence[int]]) -> None:
        if graph not in self._executors:
            self._executors[graph] = self._open(graph)
        key = graph, tuple(map(len, indices.values()))
        if key not in self._indices:
            self._indices[key] = self._memory.tensors({name: ((len(values),), "int64") for name, values in indices.items()})
        for name, values in indices.items():
            self._memory.write(self._indices[key][name], np.array(values, np.int64))
        updated = {contract.updated(name): tensor for name, tensor in tensors.items()}
        self._executors[graph].run(0, {**self._indices[key], **tensors}, updated, replay=False)


def _run_options(graph_id: int | None) -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1" if graph_id is None else str(graph_id))
    return options

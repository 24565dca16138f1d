"""The inputs of one pass in one buffer, so that one copy sends them all to any device.

Pure arithmetic on numpy arrays and the manifest's axes: the same for every graph, engine and memory.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import GraphInfo, KeyValueInfo, TensorInfo
from headstart.runtime.errors import EngineError

ALIGNMENT = 256  # bytes: what device memory is aligned to, so every tensor in one buffer is


def step_inputs(info: GraphInfo) -> list[TensorInfo]:
    """The inputs that differ from pass to pass: all but those of the states and the sources."""
    kept = state_names(info) | source_names(info)
    return [tensor for tensor in info.inputs if tensor.name not in kept]


def plain_outputs(info: GraphInfo) -> list[TensorInfo]:
    """The outputs that callers read: all but the states."""
    kept = {contract.updated(name) for name in state_names(info)}
    return [tensor for tensor in info.outputs if tensor.name not in kept]


def state_names(info: GraphInfo) -> set[str]:
    return {name for slots in info.slots for name in slots.sizes()} | {state.name for state in info.recurrent}


def source_names(info: GraphInfo) -> set[str]:
    """The cross-attention's inputs, its mask included; empty for a graph that reads no source."""
    return {name for read in info.reads for name in read.sizes()} | ({contract.ENCODER_MASK} if info.reads else set())


def lowered_info(info: GraphInfo, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> GraphInfo:
    """A graph as it was lowered: tensors may be gone or new, and floats have another precision.

    The axes of outputs that the manifest knows are the manifest's: lowering does not keep their names.
    """
    known = {tensor.name: tensor.shape for tensor in info.outputs}
    kinds = {tensor.name: tensor.dtype for tensor in inputs}

    def with_kind(pair: KeyValueInfo) -> KeyValueInfo:
        return dataclasses.replace(pair, dtype=kinds.get(pair.key_name, pair.dtype))

    return GraphInfo(
        info.file,
        tuple(inputs),
        tuple(dataclasses.replace(tensor, shape=known.get(tensor.name, tensor.shape)) for tensor in outputs),
        tuple(map(with_kind, info.slots)),
        tuple(dataclasses.replace(state, dtype=kinds.get(state.name, state.dtype)) for state in info.recurrent),
        tuple(map(with_kind, info.reads)),
    )


def measured_sizes(tensors: Iterable[TensorInfo], inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Axis -> size, of the arrays that a caller passed.

    Raises EngineError for a missing or unknown input, one of another rank, or sizes that contradict each other.
    """
    wanted = {tensor.name: tensor for tensor in tensors if tensor.name not in contract.DERIVED_INPUTS}
    if wanted.keys() != inputs.keys():
        wrong = sorted(wanted.keys() ^ inputs.keys())[0]
        raise EngineError(f"The input {wrong!r} is missing or unknown: the graph takes {', '.join(sorted(wanted))}.")
    sizes: dict[str, int] = {}
    for name, tensor in wanted.items():
        shape = inputs[name].shape
        matches = len(shape) == len(tensor.shape) and all(
            size == (sizes.setdefault(axis, size) if isinstance(axis, str) and axis.isidentifier() else axis)
            for axis, size in zip(tensor.shape, shape, strict=True)
            if isinstance(axis, int) or axis.isidentifier()
        )
        if not matches:
            raise EngineError(f"The input {name} has the shape {list(shape)}; the graph takes {list(tensor.shape)}, {sizes}.")
    return sizes


class StepInputs:
    """A pass's inputs for some sizes of the axes.

    Attributes:
        data: all of them, [bytes] uint8.
        arrays: input -> its part of `data`.
        offsets: input -> where that begins, in bytes.
    """

    def __init__(self, tensors: Collection[TensorInfo], sizes: Mapping[str, int]) -> None:
        self.tensors = {tensor.name: tensor for tensor in tensors}
        shapes = {t.name: tuple(axis if isinstance(axis, int) else sizes[axis] for axis in t.shape) for t in tensors}
        nbytes = {name: int(np.prod(shape)) * np.dtype(self.tensors[name].dtype).itemsize for name, shape in shapes.items()}
        self.offsets: dict[str, int] = {}
        end = 0
        for name, size in nbytes.items():
            self.offsets[name] = end
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.data = np.zeros(end, np.uint8)
        self.arrays: dict[str, NDArray[Any]] = {
            name: self.data[begin : begin + nbytes[name]].view(self.tensors[name].dtype).reshape(shapes[name])
            for name, begin in self.offsets.items()
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.arrays.items()}

    def fill(
        self,
        inputs: Mapping[str, NDArray[Any]],
        lengths: NDArray[np.int64],  # [B] committed slots
        row_mask: NDArray[np.bool_] | None,  # [B, T, T]
        begin: int = 0,
        end: int | None = None,
    ) -> None:
        """Write rows `begin` to `end` of what was passed. Missing rows are copies of the last that none of the others sees.

        Rows before `begin` were written by earlier passes: they are history to the graph, so every row must see them, as in a
        causal text it does. Missing chosen rows are row 0.
        """
        rows = self._fill_given(inputs, begin, end)
        if contract.WRITE_INDEX in self.arrays:
            self.arrays[contract.WRITE_INDEX][:] = lengths + begin
        if contract.ATTENTION_MASK not in self.arrays and contract.ROW_MASK not in self.arrays:
            return
        if row_mask is None:
            row_mask = np.broadcast_to(np.tri(begin + rows, dtype=np.bool_), (len(lengths), begin + rows, begin + rows))
        assert row_mask[:, begin : begin + rows, :begin].all(), "a tree has to fit one pass"
        seen = row_mask[:, begin : begin + rows, begin : begin + rows]
        if contract.ATTENTION_MASK in self.arrays:
            fill_attention_mask(self.arrays[contract.ATTENTION_MASK], (lengths + begin).tolist(), seen)
        if contract.ROW_MASK in self.arrays:
            fill_row_mask(self.arrays[contract.ROW_MASK], seen)

    def _fill_given(self, inputs: Mapping[str, NDArray[Any]], begin: int, end: int | None) -> int:
        """Copy the caller's arrays; returns the number of rows."""
        rows = 0
        for name, values in inputs.items():
            array, axes = self.arrays[name], self.tensors[name].shape
            if contract.ROWS in axes:
                axis = axes.index(contract.ROWS)
                part = values[(slice(None),) * axis + (slice(begin, end),)]
                rows = part.shape[axis]
                _fill_axis(array, part, axis, part[(slice(None),) * axis + (slice(-1, None),)])
            elif contract.CHOSEN in axes:
                _fill_axis(array, values, axes.index(contract.CHOSEN), 0)
            else:
                array[...] = values
        return rows


def _fill_axis(array: NDArray[Any], values: NDArray[Any], axis: int, padding: Any) -> None:
    """Write `values` along one axis and `padding` after them."""
    count, moved = values.shape[axis], np.moveaxis(array, axis, 0)
    moved[:count] = np.moveaxis(values, axis, 0)
    moved[count:] = padding if np.ndim(padding) == 0 else np.moveaxis(padding, axis, 0)


def fill_attention_mask(mask: NDArray[np.bool_], lengths: list[int], row_mask: NDArray[np.bool_]) -> None:
    """[B, 1, T, S]: rows see the committed slots, and of the new rows those that [B, rows, rows] says."""
    rows, padded = row_mask.shape[1], mask.shape[2]
    for index, length in enumerate(lengths):
        plane = mask[index, 0]
        plane[:, :length] = True
        plane[:, length:] = False
        plane[:rows, length : length + rows] = row_mask[index]
        if rows < padded:
            plane[rows:, length + rows] = True  # a row that sees nothing would be 0/0


def fill_row_mask(mask: NDArray[np.bool_], row_mask: NDArray[np.bool_]) -> None:
    """[B, T, T]: padding sees itself, for a row that sees nothing would be 0/0."""
    rows = row_mask.shape[1]
    mask[:] = np.eye(mask.shape[1], dtype=np.bool_)
    mask[:, :rows, :rows] = row_mask


def trimmed(array: NDArray[Any], axes: Sequence[int | str], sizes: Mapping[str, int]) -> NDArray[Any]:
    """A view without padding: of each named axis the first `sizes`."""
    return array[tuple(slice(sizes.get(axis)) if isinstance(axis, str) else slice(None) for axis in axes)]

"""TensorRT's back end of the device layer: memory at addresses that a CUDA device hands out, and copies between them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .buckets import runs
from .device import Tensor
from .step import ALIGNMENT


class Device(Protocol):
    """A GPU; `trt_cuda.Cuda` is the real one. Addresses are integers. Only `download` waits."""

    def allocate(self, nbytes: int) -> int:
        """The address of so many bytes, all zero."""
        ...

    def free(self, address: int) -> None: ...

    def upload(self, address: int, data: NDArray[Any]) -> None: ...

    def download(self, data: NDArray[Any], address: int) -> None:
        """Fill `data`, when everything asked for before is done."""
        ...

    def copy(self, target: int, source: int, pitch: int, width: int, height: int) -> None:
        """`height` pieces of `width` bytes, each `pitch` bytes after the last, from `source` to `target` on the device."""
        ...


class TrtMemory:
    """Tensors on a `Device`; those of one call lie in one piece, one after the other."""

    partial = True

    def __init__(self, device: Device) -> None:
        self.device = device

    def tensors(self, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Tensor]:
        sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in shapes.items()}
        base = self.device.allocate(sum(map(_aligned, sizes.values())))
        tensors, address = {}, base
        for name, (shape, dtype) in shapes.items():
            tensors[name] = Tensor(address, shape, dtype, base)
            address += _aligned(sizes[name])
        return tensors

    def free(self, tensors: Mapping[str, Tensor]) -> None:
        for base in {tensor.block for tensor in tensors.values()}:
            self.device.free(base)

    def write(self, tensor: Tensor, array: NDArray[Any]) -> None:
        self.device.upload(tensor.address, np.ascontiguousarray(array, tensor.dtype))

    def read(self, tensor: Tensor) -> NDArray[Any]:
        array: NDArray[Any] = np.empty(tensor.shape, tensor.dtype)
        self.device.download(array, tensor.address)
        return array


class CopyMoves:
    """Slot moves by copies on the device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._spare: tuple[int, int] = (0, 0)  # address and size of the room through which sequences are gathered

    def move(self, tensors: Mapping[str, Tensor], moved: Sequence[tuple[int, int]]) -> None:
        """Slots next to each other move together, in all tensors of one form at once where they lie in one piece."""
        for source, target, count in runs(moved):
            for address, width, pitch, height in _pieces(tensors):
                self._device.copy(address + target * width, address + source * width, pitch, count * width, height)

    def gather(self, tensors: Mapping[str, Tensor], rows: Sequence[int]) -> None:
        """Through spare memory: what is overwritten may still be needed."""
        moved = [i for i, row in enumerate(rows) if row != i]
        spare = self._room(max(tensor.nbytes for tensor in tensors.values()))
        for tensor in tensors.values():
            size = tensor.nbytes // tensor.shape[0]
            for place, i in enumerate(moved):
                self._device.copy(spare + place * size, tensor.address + rows[i] * size, size, size, 1)
            for place, i in enumerate(moved):
                self._device.copy(tensor.address + i * size, spare + place * size, size, size, 1)

    def _room(self, nbytes: int) -> int:
        if self._spare[1] < nbytes:
            if self._spare[1]:
                self._device.free(self._spare[0])
            self._spare = self._device.allocate(nbytes), nbytes
        return self._spare[0]


def _pieces(tensors: Mapping[str, Tensor]) -> list[tuple[int, int, int, int]]:
    """(address, bytes a slot, bytes a plane, planes) of one sequence's tensors; neighbours of equal form are one piece."""
    found: list[tuple[int, int, int, int]] = []
    for tensor in tensors.values():
        _, heads, slots, size = tensor.shape
        width = size * np.dtype(tensor.dtype).itemsize
        pitch = width * slots
        if found:
            begin, *form, height = found[-1]
            if form == [width, pitch] and tensor.address == begin + height * pitch:
                found[-1] = begin, width, pitch, height + heads
                continue
        found.append((tensor.address, width, pitch, heads))
    return found


def _aligned(nbytes: int) -> int:
    return -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT

"""Caches on a device: of up to so many sequences, in one piece of memory that the next text gets when this one is done.

What a plan was captured with are addresses; memory that stays where it is keeps its CUDA graphs good.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headstart.runtime import contract
from headstart.runtime.bundle import CacheInfo
from headstart.runtime.cache import CrossState, KVCache

from .buckets import moves, runs
from .tensorrt_device import Device

ALIGNMENT = 256  # bytes, of every tensor
HALF = 2  # bytes


@dataclass(frozen=True)
class Planes:
    """One cache of one sequence: `heads` planes of `slots` rows of `width` bytes."""

    name: str
    heads: int
    width: int

    def nbytes(self, slots: int) -> int:
        return self.heads * slots * self.width


@dataclass(frozen=True)
class CacheLayout:
    """What a sequence needs on the device.

    Attributes:
        planes: of the caches.
        slots: of each cache.
        source: input of the decoder -> shape of a sequence's, of what it reads of the encoder.
    """

    planes: tuple[Planes, ...]
    slots: int
    source: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, caches: Sequence[CacheInfo], cross: Sequence[CacheInfo], slots: int, source_rows: int) -> "CacheLayout":
        planes = [
            Planes(name, info.kv_heads, HALF * size)
            for info in caches
            for name, size in ((info.key_name, info.key_size), (info.value_name, info.value_size))
        ]
        source = {
            name: (info.kv_heads, source_rows, size)
            for info in cross
            for name, size in ((info.key_name, info.key_size), (info.value_name, info.value_size))
        }
        return cls(tuple(planes), slots, source | ({contract.ENCODER_MASK: (source_rows,)} if cross else {}))

    def sizes(self) -> dict[str, int]:
        """Tensor -> bytes a sequence."""
        source = {
            name: math.prod(shape) * (1 if name == contract.ENCODER_MASK else HALF) for name, shape in self.source.items()
        }
        return {planes.name: planes.nbytes(self.slots) for planes in self.planes} | source

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape, for so many sequences."""
        caches = {planes.name: (batch, planes.heads, self.slots, planes.width // HALF) for planes in self.planes}
        return caches | {name: (batch, *shape) for name, shape in self.source.items()}


class CachePool:
    """Memory for caches, one piece per batch; taken back when a cache is gone, given out again before any is allocated."""

    def __init__(self, layout: CacheLayout, device: Device) -> None:
        self.layout, self.device = layout, device
        self._idle: dict[int, list[int]] = {}

    def open(self, batch: int, cross: CrossState | None = None) -> "DeviceCache":
        """Empty caches for `batch` sequences."""
        starts, end = {}, 0
        for name, nbytes in self.layout.sizes().items():
            starts[name], end = end, end + -(-batch * nbytes // ALIGNMENT) * ALIGNMENT
        idle = self._idle.setdefault(batch, [])
        base = idle.pop() if idle else self.device.allocate(end)
        cache = DeviceCache(self.layout, self.device, {name: base + start for name, start in starts.items()}, batch)
        weakref.finalize(cache, idle.append, base)
        cache.cross = cross
        return cache


class DeviceCache(KVCache):
    """The caches of B sequences on a device, and what the decoder reads of their sources beside them.

    Attributes:
        addresses: tensor -> where the first sequence's begins; the others follow.
    """

    def __init__(self, layout: CacheLayout, device: Device, addresses: Mapping[str, int], batch: int) -> None:
        self.layout, self.addresses = layout, dict(addresses)
        self._device = device
        self._whole: DeviceCache | None = None
        super().__init__((), batch, layout.slots, "float16")

    @property
    def slots(self) -> int:
        return self.layout.slots

    @property
    def cross(self) -> CrossState | None:
        return self._cross

    @cross.setter
    def cross(self, cross: CrossState | None) -> None:
        """Sends the sources' states to the device."""
        self._cross = cross
        if cross is not None:
            for name, array in (*zip(cross.names, cross.buffers, strict=True), (contract.ENCODER_MASK, cross.mask)):
                assert array.shape == (self.batch, *self.layout.source[name])
                self._device.upload(self.addresses[name], array)

    def row(self, index: int) -> "DeviceCache":
        sizes = self.layout.sizes()
        view = DeviceCache(self.layout, self._device, {n: a + index * sizes[n] for n, a in self.addresses.items()}, 1)
        view.lengths = self.lengths[index : index + 1]
        view._cross = None if self._cross is None else self._cross.row(index)
        view._whole = self._whole or self  # whose memory it is
        return view

    def commit(self, row: int, kept: Sequence[int]) -> None:
        """Rows that stand together move together, in all caches of one form at once where they lie in one piece."""
        for source, target, count in runs(moves(int(self.lengths[row]), kept)):
            for address, width, height in self._pieces(row):
                pitch = width * self.slots
                self._device.copy(address + target * width, address + source * width, pitch, count * width, height)
        self.lengths[row] += len(kept)

    def _pieces(self, row: int) -> list[tuple[int, int, int]]:
        """(address, bytes a slot, planes) of one sequence's caches; neighbours of equal width are one piece."""
        found: list[tuple[int, int, int]] = []
        for planes in self.layout.planes:
            address = self.addresses[planes.name] + row * planes.nbytes(self.slots)
            if found and found[-1][1] == planes.width:
                begin, width, height = found[-1]
                if address == begin + height * width * self.slots:
                    found[-1] = begin, width, height + planes.heads
                    continue
            found.append((address, planes.width, planes.heads))
        return found

    def gather(self, rows: Sequence[int]) -> None:
        """Through memory set aside: what is overwritten may still be wanted."""
        moved = [i for i, row in enumerate(rows) if row != i]
        if not moved:
            return
        aside = self._aside()
        for planes in self.layout.planes:
            size, begin = planes.nbytes(self.slots), self.addresses[planes.name]
            for place, i in enumerate(moved):
                self._device.copy(aside + place * size, begin + rows[i] * size, size, size, 1)
            for place, i in enumerate(moved):
                self._device.copy(begin + i * size, aside + place * size, size, size, 1)
        self.lengths[moved] = self.lengths[[rows[i] for i in moved]]

    def _aside(self) -> int:
        """Room for one cache of every sequence, as long as this cache lives."""
        if "aside" not in self.engine_state:
            size = max(planes.nbytes(self.slots) for planes in self.layout.planes)
            self.engine_state["aside"] = address = self._device.allocate(self.batch * size)
            weakref.finalize(self, self._device.free, address)
        room: int = self.engine_state["aside"]
        return room


def decoder_addresses(cache: DeviceCache) -> dict[str, int]:
    """Tensor of a decoder's plan -> address: a cache comes in and goes out at one place."""
    updated = {contract.updated(planes.name): cache.addresses[planes.name] for planes in cache.layout.planes}
    return cache.addresses | updated

"""Key and value caches: preallocated buffers, written in place by the engine, committed here.

Every sequence of the batch has its own length. A forward writes its rows behind that length; committing keeps some of
them and moves the length on. What lies behind the length is free space, whatever it holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import CacheInfo


@dataclass(frozen=True)
class CrossState:
    """What a decoder reads of its sources: computed once, shared by all rows, never gathered.

    Attributes:
        names: of the decoder's inputs.
        buffers: cross-attention key and value of each layer in turn, [B, G, E, D] each.
        mask: [B, E] bool, which of the source's rows exist.
        hidden: [B, E, H] the encoder's states.
    """

    names: tuple[str, ...]
    buffers: tuple[NDArray[Any], ...]
    mask: NDArray[np.bool_]
    hidden: NDArray[Any]

    def states(self) -> list[NDArray[Any]]:
        """Each source's encoder states, [E, H], without padding."""
        return [states[seen] for states, seen in zip(self.hidden, self.mask, strict=True)]

    def repeated(self, count: int) -> "CrossState":
        """Every source `count` times in a row: one for each beam."""
        mask, hidden = (np.repeat(array, count, axis=0) for array in (self.mask, self.hidden))
        return CrossState(self.names, tuple(np.repeat(buffer, count, axis=0) for buffer in self.buffers), mask, hidden)

    def row(self, index: int) -> "CrossState":
        """The source of one sequence, on the same memory."""
        one = slice(index, index + 1)
        return CrossState(self.names, tuple(buffer[one] for buffer in self.buffers), self.mask[one], self.hidden[one])


class KVCache:
    """The caches of B sequences.

    Attributes:
        cross: what the decoder reads of its sources, when it has any.
        buffers: key and value of each layer in turn, [B, G, S, D] each.
        lengths: [B] int64, committed slots per sequence.
        engine_state: what the engine keeps per cache (bound buffers); no one else's business.
    """

    def __init__(self, infos: Sequence[CacheInfo], batch: int, slots: int, dtype: str, cross: CrossState | None = None) -> None:
        sizes = [size for info in infos for size in (info.key_size, info.value_size)]
        heads = [info.kv_heads for info in infos for _ in range(2)]
        dtypes = [info.dtype or dtype for info in infos for _ in range(2)]
        self.names = [name for info in infos for name in (info.key_name, info.value_name)]
        self.buffers: list[NDArray[Any]] = [
            np.zeros((batch, head, slots, size), dtype=kind) for head, size, kind in zip(heads, sizes, dtypes, strict=True)
        ]
        self.lengths: NDArray[np.int64] = np.zeros(batch, dtype=np.int64)
        self.engine_state: dict[Any, Any] = {}
        self.cross = cross

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def slots(self) -> int:
        return int(self.buffers[0].shape[2])

    def row(self, index: int) -> "KVCache":
        """The cache of one sequence, on the same memory: the batch is the outermost axis, so a slice is contiguous."""
        view = object.__new__(KVCache)
        view.names = self.names
        view.buffers = [buffer[index : index + 1] for buffer in self.buffers]
        view.lengths = self.lengths[index : index + 1]
        view.engine_state = {}
        view.cross = None if self.cross is None else self.cross.row(index)
        return view

    def commit(self, row: int, kept: Sequence[int]) -> None:
        """Keep these of the rows the last forward wrote for sequence `row`, in this order, and drop the others.

        `kept` rises, so a row only ever moves towards the front; rows already in place are not touched, and a chain
        moves nothing.
        """
        start = int(self.lengths[row])
        settled = 0
        while settled < len(kept) and kept[settled] == settled:
            settled += 1
        if settled < len(kept):
            source = [start + index for index in kept[settled:]]
            target = slice(start + settled, start + len(kept))
            for buffer in self.buffers:
                buffer[row, :, target] = buffer[row][:, source]
        self.lengths[row] = start + len(kept)

    def gather(self, rows: Sequence[int]) -> None:
        """Sequence i becomes what sequence `rows[i]` was; sequences that stay are not touched."""
        moved = [i for i, row in enumerate(rows) if row != i]
        if moved:
            sources = [rows[i] for i in moved]
            used = int(self.lengths[sources].max())
            for buffer in self.buffers:
                buffer[moved, :, :used] = buffer[sources, :, :used]
            self.lengths[moved] = self.lengths[sources]

    def rewind(self, row: int, length: int) -> None:
        """Forget all but the first `length` slots of sequence `row`."""
        assert 0 <= length <= self.lengths[row]
        self.lengths[row] = length

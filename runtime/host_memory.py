"""The host's memory of states, in numpy arrays: key/value slots, recurrent states, and the sources of cross-attention.

Devices have their own, with the same protocols (`StateMemory`, `SourceMemory`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import contract
from .bundle import KeyValueInfo, RecurrentInfo
from .errors import EngineError
from .states import SLOT_STEP, CrossState, moves

KEPT_STATES = 64  # recurrent states kept per sequence, of its last tokens: as many as a verify pass can take back


class SlotBuffers:
    """The arrays of a whole state, which grow with its sequences: attention scans every slot that is there.

    Attributes:
        arrays: key and value of each layer, [B, G, S, D] each.
        version: counts new arrays, so that what was bound to old ones is known to be stale.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], capacity: int | None = None) -> None:
        """`capacity`: the most slots; those of the arrays where None."""
        self.arrays, self.version = dict(arrays), 0
        self._capacity = self.slots if capacity is None else capacity

    @property
    def slots(self) -> int:
        """S now."""
        return int(next(array.shape[2] for array in self.arrays.values()))

    def reserve(self, slots: int) -> None:
        """Make room for so many, and for an eighth more than there was: growing copies.

        Raises EngineError for more than the capacity.
        """
        now = self.slots
        if slots <= now:
            return
        if slots > self._capacity:
            raise EngineError(f"The state holds {self._capacity} slots, and this pass needs {slots}. Fix: open a larger one.")
        wanted = -(-max(slots, now + now // 8) // SLOT_STEP) * SLOT_STEP
        for name, array in self.arrays.items():
            batch, heads, _, size = array.shape
            larger = np.zeros((batch, heads, min(wanted, self._capacity), size), array.dtype)
            larger[:, :, :now] = array
            self.arrays[name] = larger
        self.version += 1


class SlotMemory:
    """Key/value slots in the host's memory, of some of a state's sequences."""

    def __init__(self, buffers: SlotBuffers, begin: int = 0, count: int | None = None) -> None:
        self._buffers, self._begin, self._count = buffers, begin, count

    @classmethod
    def empty(cls, infos: Sequence[KeyValueInfo], batch: int, slots: int) -> "SlotMemory":
        """With room for up to `slots`, of which the first few are there."""
        first = min(slots, SLOT_STEP)
        arrays = {
            name: np.zeros((batch, info.kv_heads, first, size), info.dtype)
            for info in infos
            for name, size in info.sizes().items()
        }
        return cls(SlotBuffers(arrays, slots))

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Key and value of each layer, [B, G, S, D] each: contiguous, for the batch is the outermost axis."""
        end = None if self._count is None else self._begin + self._count
        return {name: array[self._begin : end] for name, array in self._buffers.arrays.items()}

    @property
    def slots(self) -> int:
        """S now."""
        return self._buffers.slots

    @property
    def version(self) -> int:
        return self._buffers.version

    def reserve(self, slots: int) -> None:
        """As `SlotBuffers.reserve`, for all sequences of the state."""
        self._buffers.reserve(slots)

    def view(self, begin: int, count: int) -> "SlotMemory":
        return SlotMemory(self._buffers, self._begin + begin, count)

    def commit(self, row: int, start: int, kept: Sequence[int]) -> None:
        """Rows in place are not touched, and a chain moves nothing."""
        moved = moves(start, kept)
        if moved:
            sources = [source for source, _ in moved]
            target = slice(moved[0][1], start + len(kept))
            for array in self.arrays.values():
                array[row, :, target] = array[row][:, sources]

    def gather(self, rows: Sequence[int], used: int) -> None:
        """Sequences that stay are not touched."""
        moved = [i for i, row in enumerate(rows) if row != i]
        sources = [rows[i] for i in moved]
        for array in self.arrays.values():
            array[moved, :, :used] = array[sources, :, :used]

    def rewind(self, row: int, length: int) -> None:
        """No-op: slots after the length are free, whatever they hold."""

    def save(self, row: int, length: int) -> list[NDArray[Any]]:
        return [array[row, :, :length].copy() for array in self.arrays.values()]

    def load(self, row: int, saved: Sequence[NDArray[Any]]) -> None:
        self.reserve(max(copy.shape[1] for copy in saved))
        for array, copy in zip(self.arrays.values(), saved, strict=True):
            array[row, :, : copy.shape[1]] = copy


@dataclass
class RecurrentSequence:
    """One sequence's recurrent states.

    Attributes:
        rows: state -> [T, *shape] that the last pass returned, one per row.
        kept: length -> state -> [*shape] after that many tokens, of the last KEPT_STATES lengths.
    """

    rows: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    kept: dict[int, dict[str, NDArray[Any]]] = field(default_factory=dict)


class RecurrentMemory:
    """Recurrent states in the host's memory.

    Attributes:
        arrays: state -> [B, *shape] before the next row.
    """

    def __init__(
        self, infos: Sequence[RecurrentInfo], arrays: Mapping[str, NDArray[Any]], sequences: list[RecurrentSequence], begin: int
    ) -> None:
        """`sequences`: of the whole state, of which this is the part from `begin`."""
        self.arrays = dict(arrays)
        self._infos, self._sequences, self._begin = tuple(infos), sequences, begin

    @classmethod
    def empty(cls, infos: Sequence[RecurrentInfo], batch: int) -> "RecurrentMemory":
        arrays = {info.name: np.zeros((batch, *info.shape), info.dtype) for info in infos}
        return cls(infos, arrays, [RecurrentSequence() for _ in range(batch)], 0)

    def view(self, begin: int, count: int) -> "RecurrentMemory":
        arrays = {name: array[begin : begin + count] for name, array in self.arrays.items()}
        return RecurrentMemory(self._infos, arrays, self._sequences, self._begin + begin)

    def new_rows(self, rows: int) -> dict[str, NDArray[Any]]:
        """State -> [B, rows, *shape] for a pass to write one state per row into."""
        batch = len(next(iter(self.arrays.values())))
        return {info.name: np.zeros((batch, rows, *info.shape), info.dtype) for info in self._infos}

    def returned(self, rows: Mapping[str, NDArray[Any]]) -> None:
        """Note what a pass returned: [B, T, *shape] by state; `commit` picks from it."""
        for index in range(len(next(iter(self.arrays.values())))):
            self._sequence(index).rows = {name: array[index] for name, array in rows.items()}

    def commit(self, row: int, start: int, kept: Sequence[int]) -> None:
        """The last kept row's state is the sequence's; those of the rows before it are kept for rewinding."""
        sequence = self._sequence(row)
        for place, index in enumerate(kept):
            if len(kept) - place <= KEPT_STATES:
                sequence.kept[start + place + 1] = {name: rows[index].copy() for name, rows in sequence.rows.items()}
        end = start + len(kept)
        for length in [length for length in sequence.kept if length <= end - KEPT_STATES]:
            del sequence.kept[length]
        self._set(row, sequence.kept[end])

    def gather(self, rows: Sequence[int], used: int) -> None:
        found = [self._sequence(row) for row in rows]
        for array in self.arrays.values():
            array[:] = array[list(rows)]
        for index, sequence in enumerate(found):
            self._sequences[self._begin + index] = RecurrentSequence(sequence.rows, dict(sequence.kept))

    def rewind(self, row: int, length: int) -> None:
        kept = self._sequence(row).kept
        if length and length not in kept:
            raise EngineError(
                f"A recurrent state cannot go back to {length} tokens: the states of the last {KEPT_STATES} tokens are kept. "
                "Fix: rewind to 0 and feed the text again, or take a snapshot before going on."
            )
        zeros = {info.name: np.zeros(info.shape, info.dtype) for info in self._infos}
        self._set(row, kept[length] if length else zeros)
        for later in [other for other in kept if other > length]:
            del kept[later]

    def save(self, row: int, length: int) -> tuple[dict[str, NDArray[Any]], dict[int, dict[str, NDArray[Any]]]]:
        return {name: array[row].copy() for name, array in self.arrays.items()}, dict(self._sequence(row).kept)

    def load(self, row: int, saved: tuple[dict[str, NDArray[Any]], dict[int, dict[str, NDArray[Any]]]]) -> None:
        self._set(row, saved[0])
        self._sequence(row).kept = dict(saved[1])

    def _sequence(self, row: int) -> RecurrentSequence:
        return self._sequences[self._begin + row]

    def _set(self, row: int, state: Mapping[str, NDArray[Any]]) -> None:
        for name, array in self.arrays.items():
            array[row] = state[name]


class HostSources:
    """The sources of B sequences in the host's memory, padded to the longest; a view looks at the whole.

    Attributes:
        arrays: input -> [B, …]; empty until the first source is put.
        version: counts new arrays, so that what was bound to old ones is known to be stale.
    """

    def __init__(self, batch: int) -> None:
        self.batch, self.version = batch, 0
        self.arrays: dict[str, NDArray[Any]] = {}
        self._put: set[int] = set()

    def view(self, begin: int, count: int) -> "SourceView":
        return SourceView(self, begin, count)

    def bound(self) -> dict[str, NDArray[Any]]:
        """Input -> array to bind."""
        return self.arrays

    def put(self, row: int, sources: CrossState) -> None:
        """Written where there is room; else everything is copied to longer arrays. One sequence's are taken as they are."""
        given = dict(zip(sources.names, sources.buffers, strict=True)) | {contract.ENCODER_MASK: sources.mask}
        self._put.add(row)
        if self.batch == 1:
            self.arrays, self.version = given, self.version + 1
            return
        length = sources.mask.shape[1]
        if not self.arrays or self.arrays[contract.ENCODER_MASK].shape[1] < length:
            self.arrays, self.version = self._lengthened(given), self.version + 1
        for name, array in self.arrays.items():
            array[row] = 0
            part = array[row, :length] if name == contract.ENCODER_MASK else array[row, :, :length]
            part[...] = given[name][0]

    def _lengthened(self, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        longer = {name: np.zeros((self.batch, *array.shape[1:]), array.dtype) for name, array in given.items()}
        longer[contract.ENCODER_MASK][:, 0] = True  # a sequence that sees nothing would be 0/0
        for name, array in self.arrays.items():
            old = array.shape[1] if name == contract.ENCODER_MASK else array.shape[2]
            part = longer[name][:, :old] if name == contract.ENCODER_MASK else longer[name][:, :, :old]
            part[...] = array
        return longer

    def row(self, row: int) -> CrossState | None:
        if row not in self._put:
            return None
        one = slice(row, row + 1)
        names = tuple(name for name in self.arrays if name != contract.ENCODER_MASK)
        mask = self.arrays[contract.ENCODER_MASK][one]
        return CrossState(names, tuple(self.arrays[name][one] for name in names), mask, np.zeros((1, mask.shape[1], 0)))


@dataclass(frozen=True)
class SourceView:
    """The sources of some sequences; see HostSources."""

    whole: HostSources
    begin: int
    count: int

    @property
    def version(self) -> int:
        return self.whole.version

    def view(self, begin: int, count: int) -> "SourceView":
        return SourceView(self.whole, self.begin + begin, count)

    def bound(self) -> dict[str, NDArray[Any]]:
        return {name: array[self.begin : self.begin + self.count] for name, array in self.whole.arrays.items()}

    def put(self, row: int, sources: CrossState) -> None:
        self.whole.put(self.begin + row, sources)

    def row(self, row: int) -> CrossState | None:
        return self.whole.row(self.begin + row)

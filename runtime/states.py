"""States: what a graph keeps of its sequences from one pass to the next, committed here.

Every sequence of a state has its own length. A pass writes its rows after that length; committing keeps some of them and
moves the length on. Two kinds: key/value slots, preallocated and updated in place, and recurrent states, of which a graph
returns one per row. This module has the host's memory; devices bring their own `StateMemory`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (makes numpy know bfloat16 by name)
import numpy as np
from numpy.typing import NDArray

from . import contract
from .bundle import KeyValueInfo, RecurrentInfo
from .errors import EngineError

SLOT_STEP = 64  # numbers of slots are multiples of this, so that equal requests get equal shapes
KEPT_STATES = 64  # recurrent states kept per sequence, of its last tokens: as many as a verify pass can take back


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


@dataclass(frozen=True)
class Snapshot:
    """One sequence's state, copied: what `State.restore` puts back, into this sequence or another."""

    length: int
    parts: tuple[Any, ...]


class State(Protocol):
    """The state of B sequences of one graph.

    Attributes:
        lengths: [B] int64, committed tokens per sequence.
        batch: B.
        slots: the most tokens of a sequence.
    """

    lengths: NDArray[np.int64]

    @property
    def batch(self) -> int: ...

    @property
    def slots(self) -> int: ...

    def row(self, index: int) -> "State":
        """One sequence, on the same memory."""
        ...

    def first(self, count: int) -> "State":
        """The first `count` sequences, on the same memory."""
        ...

    def commit(self, row: int, kept: Sequence[int]) -> None:
        """Keep these of the rows that the last pass wrote for sequence `row`, in rising order, and drop the others."""
        ...

    def gather(self, rows: Sequence[int]) -> None:
        """Sequence i becomes what sequence `rows[i]` was. Sources are not moved."""
        ...

    def rewind(self, row: int, length: int) -> None:
        """Forget all but the first `length` tokens of sequence `row`.

        Raises EngineError where a recurrent state of that length is no longer kept.
        """
        ...

    def snapshot(self, row: int) -> Snapshot: ...

    def restore(self, row: int, snapshot: Snapshot) -> None: ...

    def resized(self, batch: int, slots: int) -> "State":
        """A copy with more room; raises EngineError where an engine's sizes are fixed."""
        ...

    def put_sources(self, row: int, sources: CrossState) -> None:
        """The source of one sequence: `sources` has one row. Longer ones lengthen the padding of the others."""
        ...


class StateMemory(Protocol):
    """One kind of state of B sequences in some memory; lengths are the business of `GraphState`."""

    def view(self, begin: int, count: int) -> "StateMemory":
        """Some of the sequences, on the same memory."""
        ...

    def commit(self, row: int, start: int, kept: Sequence[int]) -> None:
        """As `State.commit`; `start` tokens are committed already."""
        ...

    def gather(self, rows: Sequence[int], used: int) -> None:
        """As `State.gather`; the longest sequence has `used` tokens."""
        ...

    def rewind(self, row: int, length: int) -> None: ...

    def save(self, row: int, length: int) -> Any:
        """A copy of one sequence's state."""
        ...

    def load(self, row: int, saved: Any) -> None: ...


class SourceMemory(Protocol):
    """What a graph reads of the sources of B sequences, in some memory."""

    def view(self, begin: int, count: int) -> "SourceMemory": ...

    def put(self, row: int, sources: CrossState) -> None: ...

    def row(self, row: int) -> CrossState | None:
        """One sequence's, on the host; None where none was put. Without the encoder's states, which a graph does not read."""
        ...


class GraphState:
    """The `State` of every engine: lengths, one memory for each kind of state, and one for the sources.

    Attributes:
        parts: one memory for each kind.
        sources: the cross-attention's, where the graph reads any.
        begin: of the sequences of the whole state, the first that this one holds.
        bound: what an engine keeps for this state and its views: buffers bound to passes.
    """

    def __init__(
        self,
        parts: Sequence[StateMemory],
        lengths: NDArray[np.int64],
        slots: int,
        new: Callable[[int, int], "GraphState"],
        sources: SourceMemory | None = None,
        whole: "GraphState | None" = None,
        begin: int = 0,
    ) -> None:
        """`new`: (batch, slots) -> another empty state of the graph. `whole`: the state that this one is a view of."""
        self.parts, self.lengths, self._slots, self._new = tuple(parts), lengths, slots, new
        self.sources, self.begin = sources, begin
        self._whole = whole  # keeps the memory from being given to another state
        self.bound: dict[Any, Any] = {} if whole is None else whole.bound

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def slots(self) -> int:
        return self._slots

    def row(self, index: int) -> "GraphState":
        return self._view(index, 1)

    def first(self, count: int) -> "GraphState":
        return self._view(0, count)

    def _view(self, begin: int, count: int) -> "GraphState":
        assert begin >= 0 and begin + count <= self.batch
        if count == self.batch:
            return self
        parts = [part.view(begin, count) for part in self.parts]
        sources = None if self.sources is None else self.sources.view(begin, count)
        lengths = self.lengths[begin : begin + count]
        return GraphState(parts, lengths, self._slots, self._new, sources, self._whole or self, self.begin + begin)

    def commit(self, row: int, kept: Sequence[int]) -> None:
        if not len(kept):
            return
        for part in self.parts:
            part.commit(row, int(self.lengths[row]), kept)
        self.lengths[row] += len(kept)

    def gather(self, rows: Sequence[int]) -> None:
        rows = list(rows)
        if rows == list(range(self.batch)):
            return
        used = int(self.lengths[rows].max())
        for part in self.parts:
            part.gather(rows, used)
        self.lengths[:] = self.lengths[rows]

    def rewind(self, row: int, length: int) -> None:
        assert 0 <= length <= self.lengths[row]
        for part in self.parts:
            part.rewind(row, length)
        self.lengths[row] = length

    def snapshot(self, row: int) -> Snapshot:
        length = int(self.lengths[row])
        return Snapshot(length, tuple(part.save(row, length) for part in self.parts))

    def restore(self, row: int, snapshot: Snapshot) -> None:
        assert snapshot.length <= self.slots
        for part, saved in zip(self.parts, snapshot.parts, strict=True):
            part.load(row, saved)
        self.lengths[row] = snapshot.length

    def resized(self, batch: int, slots: int) -> "GraphState":
        assert batch >= self.batch and slots >= int(self.lengths.max(initial=0))
        larger = self._new(batch, slots)
        for row in range(self.batch):
            larger.restore(row, self.snapshot(row))
            source = None if self.sources is None else self.sources.row(row)
            if source is not None:
                larger.put_sources(row, source)
        return larger

    def reading(self, sources: CrossState | None) -> "GraphState":
        """This state, with the sources of all its sequences, where there are any."""
        if sources is not None:
            for row in range(self.batch):
                self.put_sources(row, sources.row(row))
        return self

    def put_sources(self, row: int, sources: CrossState) -> None:
        assert self.sources is not None and len(sources.mask) == 1
        self.sources.put(row, sources)


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


def moves(start: int, kept: Sequence[int]) -> list[tuple[int, int]]:
    """(from slot, to slot) of a commit, in an order in which none overwrites what another still needs.

    `kept` rises, so rows only ever move towards the front; those in place are left out, and a chain moves nothing.
    """
    return [(start + row, start + place) for place, row in enumerate(kept) if row != place]

"""States: what a graph keeps of its sequences from one pass to the next, committed here.

Every sequence of a state has its own length. A pass writes its rows after that length; committing keeps some of them and
moves the length on. Two kinds: key/value slots, preallocated and updated in place, and recurrent states, of which a graph
returns one per row. Where they lie is each engine's own: `StateMemory`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (makes numpy know bfloat16 by name)
import numpy as np
from numpy.typing import NDArray

SLOT_STEP = 64  # numbers of slots are multiples of this, so that equal requests get equal shapes


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


def moves(start: int, kept: Sequence[int]) -> list[tuple[int, int]]:
    """(from slot, to slot) of a commit, in an order in which none overwrites what another still needs.

    `kept` rises, so rows only ever move towards the front; those in place are left out, and a chain moves nothing.
    """
    return [(start + row, start + place) for place, row in enumerate(kept) if row != place]

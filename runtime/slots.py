"""The target's state for the sequences that run now: one row of the batch each, the running ones always the first rows.

Sequences join and leave between passes. A pass over the first n rows reads nothing of the others, so a finished sequence costs
nothing; the last row moves into the gap that one leaves.
"""

from .graph import MAX_ROWS, Engine
from .sequence import Sequence
from .states import SLOT_STEP, CrossState, State


def slots_of(sequence: Sequence) -> int:
    """Slots for the longest text this sequence can become, and a verify pass after it."""
    return -(-(sequence.max_tokens + MAX_ROWS) // SLOT_STEP) * SLOT_STEP


class SlotTable:
    """Which sequence has which row of the target's state.

    Attributes:
        sequences: by row.
        most: sequences at once.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        built = engine.built[0] if engine.built else None
        self.most = min(most, built.batch) if built and built.batch else most
        self._fixed = bool(built and built.cache_slots)  # sizes that were chosen at build cannot grow
        self._graph = engine.graph("decoder")
        self._state: State | None = None
        self.sequences: list[Sequence] = []
        self._sources: dict[int, CrossState] = {}  # by sequence id, where sources are read

    def has_room(self, sequence: Sequence) -> bool:
        """Whether it can join now. A state whose sizes are fixed takes only what fits it while others run."""
        if len(self.sequences) >= self.most:
            return False
        state = self._state
        fits = state is None or (len(self.sequences) < state.batch and slots_of(sequence) <= state.slots)
        return fits or not self.sequences or not self._fixed

    def reserve(self, batch: int, slots: int) -> None:
        """Make room for that many sequences of that many slots."""
        state = self._state
        if state is None or not self.sequences:
            if state is None or state.batch < batch or state.slots < slots:
                self._state = self._graph.new_state(batch, slots)
        elif state.batch < batch or state.slots < slots:
            self._state = state.resized(max(batch, state.batch), max(slots, state.slots))

    def join(self, sequence: Sequence, sources: CrossState | None) -> None:
        """Give it the next row, for which there is room."""
        self.reserve(len(self.sequences) + 1, slots_of(sequence))
        row = len(self.sequences)
        self.sequences.append(sequence)
        self.state.rewind(row, 0)
        if sources is not None:
            self._sources[sequence.id] = sources
            self.state.put_sources(row, sources)

    def leave(self, finished: set[int], filling: Sequence | None) -> None:
        """Free the rows of the sequences with these ids; the last rows move into the gaps. `filling` stays the last of all."""
        kept = [row for row, sequence in enumerate(self.sequences) if sequence.id not in finished]
        moving = [row for row in kept if row >= len(kept)]
        order = [row if row in kept else moving.pop() for row in range(len(kept))]
        if filling is not None and order:
            row = order.index(self.row_of(filling))
            order[row], order[-1] = order[-1], order[row]
        if order != list(range(len(order))):
            self.state.gather([*order, *range(len(order), self.state.batch)])
        self.sequences, moved = [self.sequences[row] for row in order], [i for i, row in enumerate(order) if row != i]
        self._sources = {s.id: self._sources[s.id] for s in self.sequences if s.id in self._sources}
        for row in moved:
            sources = self._sources.get(self.sequences[row].id)
            if sources is not None:  # a state's gather leaves them where they are: beams share theirs
                self.state.put_sources(row, sources)
        if not self.sequences:
            self._state = None  # memory is given back between requests

    @property
    def state(self) -> State:
        assert self._state is not None
        return self._state

    def row_of(self, sequence: Sequence) -> int:
        return next(row for row, other in enumerate(self.sequences) if other is sequence)

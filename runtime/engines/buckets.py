"""The host's side of an engine with fixed sizes: which profile a pass takes, how its inputs are packed, what a commit moves.

Pure arithmetic on numpy arrays, so that it is tested without the device that needs it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.engines.info import Profile
from headstart.runtime.errors import EngineError

ALIGNMENT = 256  # bytes: what device memory is aligned to, so every tensor in one buffer is


@dataclass(frozen=True)
class Pass:
    """Some of a forward's rows, and the profile they go through.

    Attributes:
        profile: its index in the plan.
        begin, end: the rows.
        padded: rows of the pass; those behind `end` are copies that nobody sees.
        prompt: one row goes through the LM head, the one that is asked for; else all do.
    """

    profile: int
    begin: int
    end: int
    padded: int
    prompt: bool = False

    @property
    def chosen(self) -> int:
        """Rows through the LM head."""
        return 1 if self.prompt else self.padded


def passes(profiles: Sequence[Profile], rows: int, chosen: int, batch: int = 1) -> Iterator[Pass]:
    """Split `rows` rows into passes. A long run of rows of one sequence, of which one is chosen, is a prompt.

    Everything else is verified, in buckets.

    Raises EngineError when the plan has no profile of either kind.
    """
    prefills = [i for i, profile in enumerate(profiles) if profile.sizes["chosen"][2] == 1]
    buckets = [i for i, profile in enumerate(profiles) if i not in prefills]
    if not buckets or not prefills:
        raise EngineError("The engine has no profile for prompts, or none for verifying. Fix: build it again, with --force.")
    if batch == chosen == 1 and rows > profiles[buckets[0]].sizes["rows"][2]:
        largest = profiles[prefills[0]].sizes["rows"][2]
        for begin in range(0, rows, largest):
            end = min(begin + largest, rows)
            yield Pass(prefills[0], begin, end, end - begin, prompt=True)
        return
    largest = profiles[buckets[-1]].sizes["rows"][2]
    for begin in range(0, rows, largest):
        end = min(begin + largest, rows)
        profile = next(i for i in buckets if profiles[i].sizes["rows"][2] >= end - begin)
        padded = max(end - begin, profiles[profile].sizes["rows"][0])
        yield Pass(profile, begin, end, padded)


class Packed:
    """The inputs of one pass in one buffer: one copy sends them all.

    Attributes:
        offsets: input -> where it lies, in bytes, aligned.
        shapes: input -> its shape.
        data: the buffer, uint8.
    """

    def __init__(self, batch: int, rows: int, chosen: int) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {
            contract.INPUT_IDS: (batch, rows),
            contract.POSITION_IDS: (batch, rows),
            contract.OUTPUT_ROWS: (batch, chosen),
            contract.WRITE_INDEX: (batch,),
            contract.ROW_MASK: (batch, rows, rows),
        }
        self.offsets, end = {}, 0
        for name, shape in self.shapes.items():
            self.offsets[name] = end
            itemsize = 1 if name == contract.ROW_MASK else 8
            end += -(-int(np.prod(shape)) * itemsize // ALIGNMENT) * ALIGNMENT
        self.data = np.zeros(end, np.uint8)
        self.views = {name: self._view(name) for name in self.shapes}

    def _view(self, name: str) -> NDArray[Any]:
        dtype: Any = np.bool_ if name == contract.ROW_MASK else np.int64
        count, begin = int(np.prod(self.shapes[name])), self.offsets[name]
        view: NDArray[Any] = self.data[begin : begin + count * np.dtype(dtype).itemsize].view(dtype)
        return view.reshape(self.shapes[name])

    def fill(
        self,
        history: NDArray[np.int64],  # [B] committed slots
        part: Pass,
        token_ids: NDArray[np.int64],  # [B, T]
        position_ids: NDArray[np.int64],  # [B, T]
        row_mask: NDArray[np.bool_],  # [B, T, T]
        output_rows: NDArray[np.int64],  # [B, R]
    ) -> None:
        """Write one pass of a forward. Rows see the history, and of the forward's rows those that `row_mask` says.

        Rows of earlier passes of the forward are history to the graph: every row must see them, as in a text it does.
        """
        count, begin, end = part.end - part.begin, part.begin, part.end
        assert row_mask[:, begin:end, :begin].all(), "a tree has to fit one pass"
        for name, values in ((contract.INPUT_IDS, token_ids), (contract.POSITION_IDS, position_ids)):
            view = self.views[name]
            view[:, :count], view[:, count:] = values[:, begin:end], values[:, end - 1 : end]
        self.views[contract.WRITE_INDEX][:] = history + begin
        prompt = np.clip(output_rows - begin, 0, count - 1)
        self.views[contract.OUTPUT_ROWS][:] = prompt if part.prompt else np.arange(part.padded)
        mask = self.views[contract.ROW_MASK]
        mask[:] = np.eye(part.padded, dtype=np.bool_)  # padding sees itself: a row that sees nothing would be 0/0
        mask[:, :count, :count] = row_mask[:, begin:end, begin:end]


def moves(start: int, kept: Sequence[int]) -> list[tuple[int, int]]:
    """(from slot, to slot) of a commit, in an order in which none overwrites what another still needs.

    `kept` rises, so rows only ever move towards the front; those in place are left out, and a chain moves nothing.
    """
    return [(start + row, start + place) for place, row in enumerate(kept) if row != place]


def runs(moved: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(from slot, to slot, slots) of moves that can be made at once: neighbours whose old and new places do not overlap."""
    found: list[tuple[int, int, int]] = []
    for source, target in moved:
        if found:
            begin, place, count = found[-1]
            if (source, target) == (begin + count, place + count) and count < begin - place:
                found[-1] = begin, place, count + 1
                continue
        found.append((source, target, 1))
    return found

"""The inputs of one forward in one buffer, so that one copy sends them all to wherever they are read."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract

ALIGNMENT = 256  # bytes: what device memory is aligned to, so every tensor in one buffer is


class StepInputs:
    """The decoder's step inputs for B sequences of T rows, of which R go through the LM head, over S slots.

    Attributes:
        data: all of them, [bytes] uint8.
        arrays: input -> its part of `data`.
        offsets: input -> where that begins, in bytes.
    """

    def __init__(self, batch: int, rows: int, chosen: int, slots: int) -> None:
        shapes = {
            contract.INPUT_IDS: (batch, rows),
            contract.POSITION_IDS: (batch, rows),
            contract.WRITE_INDEX: (batch,),
            contract.OUTPUT_ROWS: (batch, chosen),
            contract.ATTENTION_MASK: (batch, 1, rows, slots),
        }
        kinds: dict[str, Any] = {name: np.bool_ if name == contract.ATTENTION_MASK else np.int64 for name in shapes}
        sizes = {name: int(np.prod(shape)) * np.dtype(kinds[name]).itemsize for name, shape in shapes.items()}
        self.offsets: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            self.offsets[name] = end
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.data = np.zeros(end, np.uint8)
        self.arrays: dict[str, NDArray[Any]] = {
            name: self.data[begin : begin + sizes[name]].view(kinds[name]).reshape(shapes[name])
            for name, begin in self.offsets.items()
        }

    def use(self, slots: int) -> NDArray[np.bool_]:
        """Let the mask have only `slots` columns; returns it, on the memory of the whole."""
        batch, _, rows, _ = self.arrays[contract.ATTENTION_MASK].shape
        begin = self.offsets[contract.ATTENTION_MASK]
        mask = self.data[begin : begin + batch * rows * slots].view(np.bool_).reshape(batch, 1, rows, slots)
        self.arrays[contract.ATTENTION_MASK] = mask
        return mask

    def fill(
        self,
        lengths: NDArray[np.int64],
        token_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        row_mask: NDArray[np.bool_],
        output_rows: NDArray[np.int64],
    ) -> None:
        """Write one step, see `Engine.forward`. Missing rows are copies of the last that none of the others sees."""
        rows, chosen = token_ids.shape[1], output_rows.shape[1]
        for name, values in ((contract.INPUT_IDS, token_ids), (contract.POSITION_IDS, position_ids)):
            array = self.arrays[name]
            array[:, :rows], array[:, rows:] = values, values[:, -1:]
        self.arrays[contract.WRITE_INDEX][:] = lengths
        self.arrays[contract.OUTPUT_ROWS][:, :chosen] = output_rows  # those behind stay 0: any row will do
        self._fill_mask(lengths.tolist(), row_mask)

    def _fill_mask(self, lengths: list[int], row_mask: NDArray[np.bool_]) -> None:
        mask = self.arrays[contract.ATTENTION_MASK]
        rows, padded = row_mask.shape[1], mask.shape[2]
        for index, length in enumerate(lengths):
            plane = mask[index, 0]
            plane[:, :length] = True
            plane[:, length:] = False
            plane[:rows, length : length + rows] = row_mask[index]
            if rows < padded:
                plane[rows:, length + rows] = True  # a row that sees nothing would be 0/0

"""A forward's outputs where the device left them: what is asked for is fetched, once."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.engine import HostOutput

from .half import STORED, widened
from .tensorrt_device import Device


@dataclass(frozen=True)
class OutputBuffers:
    """Where a decoder's plan leaves its outputs, whatever the pass.

    Attributes:
        addresses: output -> address.
        widths: output -> values a row; best_ids has one.
        precision: float16 or bfloat16, of all but best_ids.
    """

    device: Device
    addresses: Mapping[str, int]
    widths: Mapping[str, int]
    precision: str

    @classmethod
    def allocate(cls, device: Device, widths: Mapping[str, int], rows: Mapping[str, int], precision: str) -> "OutputBuffers":
        """`rows`: output -> the most rows of a pass."""
        addresses = {
            name: device.allocate((4 if name == contract.BEST_IDS else 2) * rows[name] * width)
            for name, width in widths.items()
        }
        return cls(device, addresses, widths, precision)

    def fetch(self, name: str, first: int, count: int) -> NDArray[np.float32]:
        """[count, width] float32 of the rows from `first`."""
        width = self.widths[name]
        stored = np.empty((count, width), STORED[self.precision])
        self.device.download(stored, self.addresses[name] + first * width * stored.itemsize)
        return widened(stored, self.precision)

    def best(self, count: int) -> NDArray[np.int32]:
        """[count] best tokens."""
        ids = np.empty(count, np.int32)
        self.device.download(ids, self.addresses[contract.BEST_IDS])
        return ids


class DeviceOutput:
    """A StepOutput of one pass."""

    def __init__(
        self, buffers: OutputBuffers, batch: int, rows: int, padded: int, places: NDArray[np.int64], chosen: int
    ) -> None:
        """`rows` of `padded` are real; `chosen` went through the LM head; `places` [B, R]: which of those were asked for."""
        self._buffers, self._batch, self._rows, self._padded = buffers, batch, rows, padded
        self._places, self._chosen = places, chosen
        self._best: NDArray[np.int32] | None = None

    @property
    def logits(self) -> NDArray[np.float32]:
        whole = self._buffers.fetch(contract.LOGITS, 0, self._batch * self._chosen)
        return np.take_along_axis(whole.reshape(self._batch, self._chosen, -1), self._places[:, :, None], axis=1)

    @property
    def hidden(self) -> NDArray[np.float32]:
        return self._all_rows(contract.HIDDEN)

    @property
    def aux_hidden(self) -> NDArray[np.float32] | None:
        return self._all_rows(contract.AUX_HIDDEN) if contract.AUX_HIDDEN in self._buffers.widths else None

    def _all_rows(self, name: str) -> NDArray[np.float32]:
        whole = self._buffers.fetch(name, 0, self._batch * self._padded)
        return whole.reshape(self._batch, self._padded, -1)[:, : self._rows]

    def scores(self, sequence: int) -> "DeviceScores":
        return DeviceScores(self, sequence)

    def best(self, sequence: int, row: int) -> int:
        if self._best is None:
            self._best = self._buffers.best(self._batch * self._chosen).reshape(self._batch, self._chosen)
        return int(self._best[sequence, self._places[sequence, row]])

    def logits_row(self, sequence: int, row: int) -> NDArray[np.float32]:
        place = sequence * self._chosen + int(self._places[sequence, row])
        first: NDArray[np.float32] = self._buffers.fetch(contract.LOGITS, place, 1)[0]
        return first

    def hidden_row(self, sequence: int, row: int) -> NDArray[np.float32]:
        first: NDArray[np.float32] = self._buffers.fetch(contract.HIDDEN, sequence * self._padded + row % self._rows, 1)[0]
        return first

    def wait(self) -> None:
        """Fetches the best tokens, which greedy decoding reads next anyway."""
        self.best(0, 0)

    def fetched(self) -> HostOutput:
        """All of it, before another pass overwrites it."""
        return HostOutput(self.logits, self.hidden, self.aux_hidden)


@dataclass(frozen=True)
class DeviceScores:
    """The chosen rows of one sequence."""

    output: DeviceOutput
    sequence: int

    def best(self, row: int) -> int:
        return self.output.best(self.sequence, row)

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        return self.output.logits_row(self.sequence, row)

"""The one interface for everything that runs: a graph of a bundle on some device, its inputs, outputs and states.

Knows nothing of trees, drafters or acceptance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from . import contract
from .bundle import Bundle, GraphInfo, ModelInfo
from .engines.info import EngineInfo
from .states import CrossState, State

MAX_ROWS = 64  # the most rows of one verify pass, root included


class Scores(Protocol):
    """The logits of one sequence's chosen rows, on whatever device: what acceptance reads of a pass."""

    def best(self, row: int) -> int:
        """The row's highest logit, the lowest token of equals. On a device this alone fetches no logits."""
        ...

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        """[V] float32."""
        ...


class Outputs(Protocol):
    """What a graph returned; valid until its next run.

    Decoding asks by row, so that an engine on a device fetches no more than that. Only `wait` and reading wait for the device.
    """

    def __contains__(self, name: object) -> bool: ...

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The whole array, without padding; floats as float32. Raises KeyError for an output the graph does not have."""
        ...

    def scores(self, sequence: int) -> Scores:
        """The logits of one sequence, by chosen row."""
        ...

    def rows(self, name: str, sequence: int, rows: Sequence[int]) -> NDArray[np.float32]:
        """[n, H] of an output [B, T, H], copied: it outlives the next run. Negative rows count from the end."""
        ...

    def wait(self) -> None:
        """Return when the pass is done; a measurement must call this."""
        ...


class Graph(Protocol):
    """A graph made ready for one device.

    Attributes:
        name: as `Engine.graph` takes it.
        info: the manifest's description: axes, states, sources.
    """

    name: str
    info: GraphInfo

    def new_state(self, batch: int, slots: int, sources: CrossState | None = None) -> State:
        """The empty state of `batch` sequences of up to `slots` tokens, with their sources when it reads any.

        Raises EngineError for more than the engine was built for, or than the device has room for.
        """
        ...

    def run(
        self,
        inputs: Mapping[str, NDArray[Any]],
        state: State | None = None,
        row_mask: NDArray[np.bool_] | None = None,  # [B, T, T], which of the new rows each new row sees
    ) -> Outputs:
        """One pass. `inputs` are the graph's own by name; positions, masks and states are the engine's business.

        With a state, T rows per sequence are written after its committed tokens; nothing is committed. Without a row mask
        the rows are a causal chain. A graph whose states are some of another's (an early exit) runs with the other's state.
        """
        ...


@runtime_checkable
class SplitDecoder(Protocol):
    """A decoder `Graph` that can be run without its LM head, and the LM head later."""

    def run_body(
        self,
        inputs: Mapping[str, NDArray[Any]],
        state: State | None = None,
        row_mask: NDArray[np.bool_] | None = None,
    ) -> Outputs:
        """As `Graph.run`, without logits; `output_rows` are not read."""
        ...

    def score(self, hidden: NDArray[np.float32]) -> Scores:
        """The logits of hidden states [R, H] of any passes; valid until the next call."""
        ...


class Engine(Protocol):
    """A bundle's graphs made ready for one device.

    Attributes:
        device: as the command line names it.
        threads: of the CPU; 0 on a device.
        built: what `headstart build` wrote for this device, and its folder; None for the canonical graphs.
    """

    bundle: Bundle
    model: ModelInfo
    device: str
    threads: int
    built: tuple[EngineInfo, Path] | None

    @property
    def exact(self) -> bool:
        """Only the order of summation differs from the canonical graph; False when activations are rounded to fewer bits."""
        ...

    def graph(self, name: str) -> Graph:
        """ "decoder", "encoder", "heads/medusa", …; opened on first use. Raises EngineError for one the bundle lacks."""
        ...

    def encode(self, sources: Sequence[NDArray[Any]]) -> CrossState:
        """Run the encoder over each source: [E] int64 token ids, or features as the encoder's graph takes them.

        Raises PromptError for a source it cannot take.
        """
        ...

    def features(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """[samples] of a recording to the encoder's input."""
        ...


@dataclass(frozen=True)
class HostScores:
    """Scores in the host's memory: `logits` [R, V] float32."""

    logits: NDArray[np.float32]

    def best(self, row: int) -> int:
        return int(self.logits[row].argmax())

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self.logits[row]
        return logits


@dataclass(frozen=True)
class HostOutputs:
    """Outputs in the host's memory, by name."""

    arrays: Mapping[str, NDArray[Any]]

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> NDArray[Any]:
        return as_float32(self.arrays[name])

    def scores(self, sequence: int) -> HostScores:
        return HostScores(as_float32(self.arrays[contract.LOGITS][sequence]))

    def rows(self, name: str, sequence: int, rows: Sequence[int]) -> NDArray[np.float32]:
        copy: NDArray[np.float32] = as_float32(self.arrays[name][sequence][list(rows)])  # an index list copies
        return copy

    def wait(self) -> None:
        """No-op: already on the host."""


def as_float32(array: NDArray[Any]) -> NDArray[Any]:
    """Half precision widened; a float32 array, or one of integers, as it is."""
    return array if array.dtype.kind in "iub" else array.astype(np.float32, copy=False)

"""The engine interface: one forward of the target (or of a draft model) over new rows, on whatever device.

An engine knows its graphs and its buffers. It knows nothing of trees, drafters or acceptance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .bundle import ModelInfo
from .cache import CrossState, KVCache

MAX_ROWS = 64  # the most rows of one verify pass, root included
SLOT_STEP = 64  # cache sizes are multiples of this, so that equal requests get equal shapes


class Scores(Protocol):
    """The logits of one sequence's chosen rows, wherever they lie: what acceptance reads of a forward."""

    def best(self, row: int) -> int:
        """The row's highest logit, the lowest token of equals. On a device this alone fetches no logits."""
        ...

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        """[V] float32."""
        ...


class StepOutput(Protocol):
    """What a forward returns; it belongs to the engine and holds until its next forward.

    Whole arrays are there for whoever wants them. Decoding asks by row, so that an engine on a device fetches no more than
    that. Nothing but `wait` and what is read waits for the device.
    """

    @property
    def logits(self) -> NDArray[np.float32]:
        """[B, R, V]."""
        ...

    @property
    def hidden(self) -> NDArray[np.float32]:
        """[B, T, H], after the final norm."""
        ...

    @property
    def aux_hidden(self) -> NDArray[np.float32] | None:
        """[B, T, n * H], when the bundle has aux layers."""
        ...

    def scores(self, sequence: int) -> Scores: ...

    def hidden_row(self, sequence: int, row: int) -> NDArray[np.float32]:
        """[H], a copy that outlives the next forward; negative rows count from the end."""
        ...

    def wait(self) -> None:
        """Return when the forward is done: what whoever measures it must call."""
        ...


@dataclass(frozen=True)
class ArrayScores:
    """Scores that are at hand: `logits` [R, V] float32."""

    logits: NDArray[np.float32]

    def best(self, row: int) -> int:
        return int(self.logits[row].argmax())

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self.logits[row]
        return logits


@dataclass(frozen=True)
class HostOutput:
    """A StepOutput of arrays at hand; see there for their shapes."""

    logits: NDArray[np.float32]
    hidden: NDArray[np.float32]
    aux_hidden: NDArray[np.float32] | None = None

    def scores(self, sequence: int) -> ArrayScores:
        return ArrayScores(self.logits[sequence])

    def hidden_row(self, sequence: int, row: int) -> NDArray[np.float32]:
        copy: NDArray[np.float32] = self.hidden[sequence, row].copy()
        return copy

    def wait(self) -> None:
        """It is there."""


class Engine(Protocol):
    """A bundle's graphs made ready for one device."""

    model: ModelInfo
    device: str

    @property
    def exact(self) -> bool:
        """Only the order of summation differs from the canonical graph; False when activations are rounded to integers."""
        ...

    def encode(self, sources: Sequence[NDArray[Any]]) -> CrossState:
        """Run the encoder over each source: [E] int64 token ids, or features as the encoder's graph takes them.

        Raises PromptError for a source it cannot take.
        """
        ...

    def features(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """[samples] of a recording to what the encoder reads of it."""
        ...

    def new_cache(self, batch: int, slots: int, cross: CrossState | None = None) -> KVCache:
        """Empty caches for `batch` sequences of up to `slots` tokens, over the sources that were encoded."""
        ...

    def forward(
        self,
        cache: KVCache,
        token_ids: NDArray[np.int64],  # [B, T]
        position_ids: NDArray[np.int64],  # [B, T]
        row_mask: NDArray[np.bool_],  # [B, T, T], which of the new rows each new row sees
        output_rows: NDArray[np.int64],  # [B, R]
    ) -> StepOutput:
        """Write T rows per sequence behind its committed slots and return their outputs. Commits nothing."""
        ...


class Head(Protocol):
    """A draft head's graph: hidden states to candidates."""

    def propose(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """[B, 1, H] to (top-k ids, top-k log-probabilities), both [B, K, k]."""
        ...

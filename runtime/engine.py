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


@dataclass(frozen=True)
class StepOutput:
    """What a forward returns. The arrays belong to the engine and hold until its next forward.

    Attributes:
        logits: [B, R, V] float32.
        hidden: [B, T, H] float32, after the final norm.
        aux_hidden: [B, T, n * H] float32, when the bundle has aux layers.
    """

    logits: NDArray[np.float32]
    hidden: NDArray[np.float32]
    aux_hidden: NDArray[np.float32] | None = None


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

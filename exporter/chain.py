"""What a canonical decoder is fed to read one text from its beginning."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Manifest


def causal_chain(manifest: Manifest, token_ids: NDArray[np.int64], output_rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Inputs for [1, T] tokens as a causal chain over empty slots, but for those of an encoder.

    `output_rows`: [1, R], the rows that go through the LM head.
    """
    length = token_ids.shape[1]
    inputs: dict[str, NDArray[Any]] = {
        contract.INPUT_IDS: token_ids,
        contract.POSITION_IDS: np.arange(length)[None],
        contract.ATTENTION_MASK: np.tri(length, dtype=np.bool_)[None, None],
        contract.WRITE_INDEX: np.zeros(1, np.int64),
        contract.OUTPUT_ROWS: output_rows,
    }
    for slots in manifest.graphs["decoder"].slots:
        for name, size in slots.sizes().items():
            inputs[name] = np.zeros((1, slots.kv_heads, length, size), slots.dtype)
    return inputs

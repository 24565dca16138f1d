"""Running known tokens through an engine: the prompt, or whatever a draft model has not seen yet."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import contract
from .errors import PromptError
from .graph import Engine, Outputs
from .states import State

CHUNK = 256  # rows per forward; larger ones cost memory (rows x slots of attention) and save little


def check_prompts(prompts: Sequence[Sequence[int]], limit: int) -> None:
    """Raises PromptError when one is empty or leaves no room for a new token among `limit`."""
    longest = max(map(len, prompts), default=0)
    if longest == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise PromptError("The prompt is empty: decoding needs at least one token to start from.")
    if longest >= limit:
        raise PromptError(
            f"The prompt has {longest} tokens, and this bundle's cache holds {limit} with room for no new one. "
            f"Fix: at most {limit - 1} tokens, or export again with a larger --max-cache."
        )


def open_state(engine: Engine, slots: int, source: NDArray[Any] | None = None) -> State:
    """The decoder's empty state for one sequence, and its source encoded when the model has an encoder."""
    return engine.graph("decoder").new_state(1, slots, None if source is None else engine.encode([source]))


def run_decoder(
    engine: Engine,
    state: State,
    token_ids: NDArray[np.int64],  # [B, T]
    position_ids: NDArray[np.int64],  # [B, T]
    row_mask: NDArray[np.bool_],  # [B, T, T], which of the new rows each new row sees
    output_rows: NDArray[np.int64],  # [B, R]
) -> Outputs:
    """One pass of the decoder over new rows; commits nothing."""
    inputs = {contract.INPUT_IDS: token_ids, contract.POSITION_IDS: position_ids, contract.OUTPUT_ROWS: output_rows}
    return engine.graph("decoder").run(inputs, state, row_mask)


def prefill(engine: Engine, state: State, token_ids: Sequence[int]) -> Outputs:
    """Write and commit `token_ids` after the state of one sequence, in chunks.

    Returns the last chunk's outputs: logits [1, 1, V] of the last token, hidden [1, T, H].
    """
    assert state.batch == 1 and len(token_ids) > 0
    for begin in range(0, len(token_ids), CHUNK):
        chunk = token_ids[begin : begin + CHUNK]
        count, start = len(chunk), int(state.lengths[0])
        outputs = run_decoder(
            engine,
            state,
            np.array(chunk, np.int64)[None],
            np.arange(start, start + count, dtype=np.int64)[None],
            np.tri(count, dtype=np.bool_)[None],
            np.array([[count - 1]], np.int64),
        )
        state.commit(0, range(count))
    return outputs


def last_logits(outputs: Outputs) -> NDArray[np.float32]:
    """[V] of the row that `prefill` returned, copied."""
    logits: NDArray[np.float32] = outputs.rows(contract.LOGITS, 0, [0])[0]
    return logits

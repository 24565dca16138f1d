"""Running known tokens through an engine: the prompt, or whatever a draft model has not seen yet."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import contract
from .bundle import ModelInfo
from .errors import PromptError
from .graph import Engine, Outputs
from .states import State
from .tokenizer import check_tokens

CHUNK = 256  # rows per pass; larger ones cost memory (rows x slots of attention) and save little


def check_prompt(prompt: Sequence[int], model: ModelInfo) -> None:
    """Raises PromptError for one that is empty, leaves no room in the cache for a new token, or has an unknown token."""
    if not prompt:
        raise PromptError("The prompt is empty: decoding needs at least one token to start from.")
    if len(prompt) >= model.max_cache:
        raise PromptError(
            f"The prompt has {len(prompt)} tokens, and this bundle's cache holds {model.max_cache} with room for no new one. "
            f"Fix: at most {model.max_cache - 1} tokens, or export again with a larger --max-cache."
        )
    check_tokens(prompt, model.vocab_size)


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
    return engine.graph("decoder").run(decoder_inputs(token_ids, position_ids, output_rows), state, row_mask)


def decoder_inputs(
    token_ids: NDArray[np.int64], position_ids: NDArray[np.int64], output_rows: NDArray[np.int64]
) -> dict[str, NDArray[np.int64]]:
    """What a pass of the decoder is given; shapes as for `run_decoder`."""
    return {contract.INPUT_IDS: token_ids, contract.POSITION_IDS: position_ids, contract.OUTPUT_ROWS: output_rows}


def prompt_chunk(engine: Engine, state: State, token_ids: Sequence[int]) -> Outputs:
    """Write and commit `token_ids` after the state of one sequence, in one pass.

    Returns its outputs: logits [1, 1, V] of the last token, hidden [1, T, H].
    """
    assert state.batch == 1 and len(token_ids) > 0
    count, start = len(token_ids), int(state.lengths[0])
    outputs = run_decoder(
        engine,
        state,
        np.array(token_ids, np.int64)[None],
        np.arange(start, start + count, dtype=np.int64)[None],
        np.tri(count, dtype=np.bool_)[None],
        np.array([[count - 1]], np.int64),
    )
    state.commit(0, range(count))
    return outputs


def prefill(engine: Engine, state: State, token_ids: Sequence[int]) -> Outputs:
    """As `prompt_chunk`, in chunks of CHUNK rows; returns the last one's outputs."""
    for begin in range(0, len(token_ids), CHUNK):
        outputs = prompt_chunk(engine, state, token_ids[begin : begin + CHUNK])
    return outputs


def last_logits(outputs: Outputs) -> NDArray[np.float32]:
    """[V] of the row that `prefill` returned, copied."""
    logits: NDArray[np.float32] = outputs.rows(contract.LOGITS, 0, [0])[0]
    return logits

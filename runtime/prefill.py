"""Running known tokens through a graph: the prompt, or whatever a draft model has not seen yet."""

from collections.abc import Sequence

import numpy as np

from . import contract
from .errors import PromptError
from .graph import Graph, Outputs
from .states import State

CHUNK = 256  # rows per pass; larger ones cost memory (rows x slots of attention) and save little


def check_prompt(prompt: Sequence[int], limit: int, vocab_size: int) -> None:
    """Raises PromptError for one that is empty, leaves no room for a new token among `limit`, or has an unknown token."""
    if not prompt:
        raise PromptError("The prompt is empty: decoding needs at least one token to start from.")
    if len(prompt) >= limit:
        raise PromptError(
            f"The prompt has {len(prompt)} tokens, and this bundle's cache holds {limit}, which leaves no room for a new one. "
            f"Fix: at most {limit - 1} tokens, or export again with a larger --max-cache."
        )
    unknown = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if unknown is not None:
        raise PromptError(f"The prompt has the token id {unknown}, and this model's ids are 0 to {vocab_size - 1}.")


def prompt_chunk(graph: Graph, state: State, token_ids: Sequence[int]) -> Outputs:
    """Write and commit `token_ids` after the state of one sequence, in one pass. The outputs' one chosen row is the last."""
    assert state.batch == 1 and len(token_ids) > 0
    count, start = len(token_ids), int(state.lengths[0])
    inputs = {
        contract.INPUT_IDS: np.array(token_ids, np.int64)[None],
        contract.POSITION_IDS: np.arange(start, start + count, dtype=np.int64)[None],
        contract.OUTPUT_ROWS: np.array([[count - 1]], np.int64),
    }
    outputs = graph.run(inputs, state, np.tri(count, dtype=np.bool_)[None])
    state.commit(0, range(count))
    return outputs


def prefill(graph: Graph, state: State, token_ids: Sequence[int]) -> Outputs:
    """As `prompt_chunk`, in chunks; returns the last one's outputs."""
    for begin in range(0, len(token_ids), CHUNK):
        outputs = prompt_chunk(graph, state, token_ids[begin : begin + CHUNK])
    return outputs

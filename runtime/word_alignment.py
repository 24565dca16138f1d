"""The decoder reads a window's text once more, to see where in the sound it attends as it writes each token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import contract
from .errors import OptionError
from .graph import Engine
from .prefill import CHUNK, prompt_chunk
from .segments import STEP_S, Span
from .states import SLOT_STEP, CrossState
from .tokenizer import Tokenizer
from .word_times import Weights, Word, attended, split_words, token_starts, with_punctuation, without_pauses

Heads = tuple[tuple[int, ...], ...]  # (layer, head)


def check_alignment(engine: Engine) -> None:
    """Raises OptionError for a bundle that does not tell where it attends."""
    outputs = {tensor.name for tensor in engine.bundle.manifest.graphs["decoder"].outputs}
    if contract.ALIGNMENT not in outputs:
        raise OptionError(
            f"{engine.bundle.path} cannot tell words' times: its checkpoint names no alignment_heads, or it was exported "
            "before they were kept. Fix: export a checkpoint again whose generation_config.json names them."
        )


def words_of(
    engine: Engine,
    tokenizer: Tokenizer,
    features: NDArray[Any],
    prompt: Sequence[int],
    spans: Sequence[Span],
    frames: int,
    language: str,
) -> list[list[Word]]:
    """The words of each span of one window, in seconds from the window's beginning.

    Args:
        features: of the window, as the encoder reads them.
        prompt: what the decoder starts from, ending with "no timestamps".
        frames: of the encoder's states that hold sound, STEP_S each.
    """
    tokens = [token for span in spans for token in span.token_ids]
    if not tokens:
        return [[] for _ in spans]
    heads = engine.bundle.manifest.generation.alignment_heads
    sources = engine.encode([features])
    weights = attended(_queries(engine, sources, [*prompt, *tokens], len(heads)), _keys(sources, heads), frames)
    starts = token_starts(weights, len(tokens) + 1) * STEP_S  # the last is where the text ends
    found: list[list[Word]] = []
    at = 0
    for span in spans:
        own = split_words(span.token_ids, tokenizer.decode, language)
        bounds = at + np.cumsum([0, *map(len, own)])
        times = zip(own, bounds[:-1], bounds[1:], strict=True)
        words = [Word(float(starts[begin]), float(starts[end]), tokenizer.decode(word)) for word, begin, end in times]
        found.append(with_punctuation(without_pauses(words)))
        at += len(span.token_ids)
    return found


def _queries(engine: Engine, sources: CrossState, token_ids: Sequence[int], heads: int) -> Weights:
    """[T, n, D] of a row for each token."""
    slots = -(-len(token_ids) // SLOT_STEP) * SLOT_STEP
    state = engine.graph("decoder").new_state(1, slots, sources)
    rows = []
    for begin in range(0, len(token_ids), CHUNK):
        chunk = token_ids[begin : begin + CHUNK]
        rows.append(prompt_chunk(engine, state, chunk).rows(contract.ALIGNMENT, 0, range(len(chunk))))
    joined = np.concatenate(rows)
    return joined.reshape(len(joined), heads, -1)


def _keys(sources: CrossState, heads: Heads) -> Weights:
    """[n, E, D] what those heads read of the source; heads may share keys."""
    by_name = dict(zip(sources.names, sources.buffers, strict=True))
    return np.stack([by_name[contract.cross_key_name(layer)][0, head] for layer, head in heads]).astype(np.float32)

"""Log-probabilities of decided tokens, under the target's own distribution."""

import numpy as np
from numpy.typing import NDArray

from .graph import Scores
from .sampling import kth_best
from .sequence import TokenLogProbs


def log_probs(wanted: int | None, tokens: list[int], rows: list[int], scores: Scores) -> list[TokenLogProbs]:
    """Of each token, decided at the row of the same place."""
    if wanted is None:
        return []
    return [_token_log_probs(token, scores[row], wanted) for token, row in zip(tokens, rows, strict=False)]


def _token_log_probs(token: int, logits: NDArray[np.float32], count: int) -> TokenLogProbs:
    normalised = logits - logits.max()
    # The sum over a whole vocabulary is in float64; the exponentials need no more bits than they have.
    total = np.log(np.exp(normalised).sum(dtype=np.float64))
    best = _largest(normalised, count)
    top = tuple((int(i), float(normalised[i] - total)) for i in best)
    return TokenLogProbs(token, float(normalised[token] - total), top)


def _largest(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Places of the largest, best first; of equal ones the first. Without sorting a whole vocabulary for a few."""
    if count <= 0:
        return np.zeros(0, np.int64)
    found = np.flatnonzero(values >= kth_best(values, min(count, len(values))))
    return found[np.argsort(-values[found], kind="stable")][:count]

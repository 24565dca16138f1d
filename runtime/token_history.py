"""What rules remember of a growing text. Forks are cheap: they share all but the last few tokens.

What was indexed is never changed in place, so any number of forks may share it. Newer tokens are kept in a short list of
each fork's own; when it is full, they are folded into a new index, which the others do not see.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

FOLD = 32  # tokens kept apart before they are indexed: deeper than most draft trees, so that few forks ever fold

Followers = Mapping[tuple[int, ...], frozenset[int]]  # the first n - 1 tokens of n-grams → their last tokens


class SeenTokens:
    """The set of a text's tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._indexed = np.unique(np.asarray(tokens, np.int64))
        self._recent: list[int] = []

    def advance(self, token: int) -> None:
        self._recent.append(token)
        if len(self._recent) >= FOLD:
            self._indexed, self._recent = np.unique(self.array()), []

    def fork(self) -> "SeenTokens":
        other = SeenTokens.__new__(SeenTokens)
        other._indexed, other._recent = self._indexed, self._recent.copy()
        return other

    def array(self) -> NDArray[np.int64]:
        """The tokens; some may be listed twice."""
        return np.concatenate([self._indexed, np.array(self._recent, np.int64)])


class NGramHistory:
    """The n-grams of a text: which tokens have followed its last n - 1 tokens before."""

    def __init__(self, size: int, tokens: Sequence[int]) -> None:
        self._size = size
        self._index(ngram_followers(tokens, size), tokens)
        self._repeats: frozenset[int] | None = None

    def _index(self, followers: Followers, tokens: Sequence[int]) -> None:
        self._followers = followers
        self._recent = list(last_tokens(tokens, self._size - 1))  # the beginnings of n-grams to come, then newer tokens

    def advance(self, token: int) -> None:
        self._repeats = None
        self._recent.append(token)
        if len(self._recent) >= FOLD + self._size - 1:
            self._index(ngram_followers(self._recent, self._size, self._followers), self._recent)

    def fork(self) -> "NGramHistory":
        other = NGramHistory.__new__(NGramHistory)
        other._size, other._followers, other._repeats = self._size, self._followers, self._repeats
        other._recent = self._recent.copy()
        return other

    def repeats(self) -> frozenset[int]:
        """The tokens that would complete an n-gram that the text already holds."""
        if self._repeats is None:
            prefix = last_tokens(self._recent, self._size - 1)
            indexed = self._followers.get(prefix, frozenset())
            # Without a full prefix there is no n-gram; the short list is then the whole text, and holds no n-gram either.
            self._repeats = indexed | ngram_followers(self._recent, self._size).get(prefix, frozenset())
        return self._repeats


def ngram_followers(tokens: Sequence[int], size: int, known: Followers | None = None) -> Followers:
    """The n-grams of `tokens`, and those that were known: a new mapping."""
    found: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for *prefix, last in zip(*(tokens[i:] for i in range(size)), strict=False):
        found[tuple(prefix)].add(last)
    known = known or {}
    return {**known, **{prefix: known.get(prefix, frozenset()) | lasts for prefix, lasts in found.items()}}


def last_tokens(tokens: Sequence[int], count: int) -> tuple[int, ...]:
    """The last `count` tokens, or all where there are fewer."""
    return tuple(tokens[max(0, len(tokens) - count) :])

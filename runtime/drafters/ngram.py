"""Prompt lookup: the continuation of the last few tokens at their previous occurrence in the text, or in its source.

No training, no graph: an index from n-grams to where they ended, kept up to date as the text grows (PLD, and CopySpec,
arXiv 2502.08923). The source, an encoder's input, precedes the text in the index. Several earlier occurrences become
branches of one tree. The longer the match, the longer the copy: tuning measures how often copies of each origin, length of
match and depth are right.
"""

from collections.abc import Sequence

from headstart.runtime.tree import DraftTree, tree_from_branches

from .base import DraftRequest, DraftSequence, step
from .text_index import TextIndexDrafter

KEPT_ENDS = 8  # most recent occurrences remembered per n-gram
LONGEST_MATCH = 32  # tokens a match is followed back
BOUNDARY = -1  # separates source and text; no token, so that no match crosses it
# A node's class: text or source, length of the match, depth of the node, rank of the branch. Each list holds the lowest
# of each step.
ORIGINS = (0, 1)
MATCHES = (1, 2, 3, 4, 6, 10, 16, 32)
DEPTHS = (1, 2, 3, 5, 9, 17)
RANKS = (0, 1, 2)
# Probability that a copied token is right, by length of the match: priors for ordering, which tuning replaces.
PRIOR = (0.3, 0.5, 0.65, 0.75, 0.8, 0.85, 0.9, 0.95)
RANK_DISCOUNT = 0.6


class NGramIndex:
    """One text's n-grams of `min_n` to `max_n` tokens, and those of its source."""

    def __init__(self, max_n: int, min_n: int, source_ids: Sequence[int] = ()) -> None:
        self._sizes = range(max_n, min_n - 1, -1)  # longest first
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._tokens: list[int] = []
        self._take_in(source_ids)
        if source_ids:
            self._tokens.append(BOUNDARY)
        self.text_begin = len(self._tokens)

    def update(self, token_ids: Sequence[int]) -> None:
        """Take in the text so far; only what is new is indexed. The last token's n-grams wait until they are followed."""
        self._take_in(token_ids[len(self._tokens) - self.text_begin :])

    def _take_in(self, token_ids: Sequence[int]) -> None:
        known = len(self._tokens)
        self._tokens.extend(token_ids)
        for end in range(max(known, 1), len(self._tokens)):
            for size in self._sizes:
                if size <= end:
                    ends = self._ends.setdefault(tuple(self._tokens[end - size : end]), [])
                    ends.append(end)
                    del ends[:-KEPT_ENDS]

    def forget(self, count: int) -> None:
        """Keep the first `count` tokens of the text. Of an n-gram that was seen often, an older place may be missing now."""
        kept = self.text_begin + count
        for end in range(kept, len(self._tokens)):
            for size in self._sizes:
                ends = self._ends.get(tuple(self._tokens[end - size : end]), []) if size <= end else []
                if end in ends:
                    ends.remove(end)
        del self._tokens[kept:]

    def matches(self, branches: int) -> list[tuple[int, int]]:
        """Up to `branches` (position of the continuation, length of the match): longest match, then most recent, first."""
        found: dict[int, int] = {}
        for size in self._sizes:
            for end in reversed(self._ends.get(tuple(self._tokens[-size:]), ())):
                if size <= len(self._tokens) and len(found) < branches:
                    found.setdefault(end, size)
        lengths = {end: self._length(end, size) for end, size in found.items()}
        return sorted(lengths.items(), key=lambda item: (-item[1], -item[0]))

    def _length(self, end: int, known: int) -> int:
        """How many tokens before `end` equal those before the end of the text, up to LONGEST_MATCH."""
        tokens, length = self._tokens, known
        while length < min(end, LONGEST_MATCH) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        return length

    def continuation(self, start: int, count: int) -> list[int]:
        """`count` tokens from `start`; past the end of the text the copy goes on with what it has itself copied.

        A copy out of the source ends where the source does.
        """
        tokens = self._tokens
        if start < self.text_begin:
            return tokens[start : min(start + count, self.text_begin - 1)]
        period = len(tokens) - start
        return [tokens[start + i % period] for i in range(count)]


class NGramDrafter(TextIndexDrafter[NGramIndex]):
    """Copies from the prompt and the output so far, and from the source."""

    name = "ngram"
    default_nodes = 8
    class_count = len(ORIGINS) * len(MATCHES) * len(DEPTHS) * len(RANKS)

    def __init__(self, max_n: int = 4, min_n: int = 1, branches: int = 4) -> None:
        self._max_n, self._min_n, self._branches = max_n, min_n, branches
        super().__init__()

    def prior_rates(self) -> list[float]:
        return [
            PRIOR[match] * (RANK_DISCOUNT**rank if depth == 0 else 1.0)
            for _ in ORIGINS
            for match in range(len(MATCHES))
            for depth in range(len(DEPTHS))
            for rank in range(len(RANKS))
        ]

    def new_index(self, sequence: DraftSequence) -> NGramIndex:
        return NGramIndex(self._max_n, self._min_n, sequence.source_ids)

    def taken_back(self, sequence: DraftSequence, known: int) -> None:
        self._indexes[sequence.id].forget(known)

    def draft(self, index: NGramIndex, request: DraftRequest) -> DraftTree:
        index.update(request.sequence.token_ids)
        return self._tree(index, request.max_nodes, request.max_depth)

    def _tree(self, index: NGramIndex, nodes: int, max_depth: int) -> DraftTree:
        """Continuations of the matches, each a branch."""
        branches = []
        for rank, (start, length) in enumerate(index.matches(self._branches)):
            token_ids = index.continuation(start, min(nodes, max_depth))
            origin = int(start < index.text_begin)
            branches.append((token_ids, [node_class(origin, length, depth, rank) for depth in range(1, len(token_ids) + 1)]))
        return tree_from_branches(branches, self._log_rates).best(nodes, max_depth)


def node_class(origin: int, match: int, depth: int, rank: int) -> int:
    """The class of a node that copies what followed a match of that length; origin 1 is the source."""
    place = (origin * len(MATCHES) + step(MATCHES, match)) * len(DEPTHS) + step(DEPTHS, depth)
    return place * len(RANKS) + step(RANKS, rank)

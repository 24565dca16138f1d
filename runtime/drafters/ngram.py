"""Prompt lookup: what followed the last few tokens the last time they stood in the text.

No training, no graph: an index from n-grams to where they ended, kept up to date as the text grows (PLD, and CopySpec,
arXiv 2502.08923). Several earlier occurrences become branches of one tree.
"""

from collections.abc import Sequence

import numpy as np

from headstart.runtime.tree import ROOT, DraftTree, empty_tree

from .base import DraftRequest

KEPT_ENDS = 8  # most recent occurrences remembered per n-gram
# Chance that the next copied token is right, by length of the match: priors for ordering, not measurements. Tuning
# replaces them. They fall with rank, so that the most recent occurrence of the longest match comes first.
PRIOR = (0.0, 0.3, 0.5, 0.65, 0.75)
RANK_DISCOUNT = 0.6


class NGramIndex:
    """One text's n-grams of `min_n` to `max_n` tokens."""

    def __init__(self, max_n: int, min_n: int) -> None:
        self._sizes = range(max_n, min_n - 1, -1)  # longest first
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._tokens: list[int] = []

    def update(self, token_ids: Sequence[int]) -> None:
        """Take in the text so far; only what is new is indexed. The last token's n-grams wait until they are followed."""
        known = len(self._tokens)
        self._tokens.extend(token_ids[known:])
        for end in range(max(known, 1), len(self._tokens)):
            for size in self._sizes:
                if size <= end:
                    ends = self._ends.setdefault(tuple(self._tokens[end - size : end]), [])
                    ends.append(end)
                    del ends[:-KEPT_ENDS]

    def matches(self, branches: int) -> list[tuple[int, int]]:
        """Up to `branches` (position of the continuation, size of the match): longest match, then most recent, first."""
        found: dict[int, int] = {}
        for size in self._sizes:
            for end in reversed(self._ends.get(tuple(self._tokens[-size:]), ())):
                if size <= len(self._tokens) and len(found) < branches:
                    found.setdefault(end, size)
        return list(found.items())

    def propose(self, nodes: int, max_depth: int, branches: int) -> DraftTree:
        """Continuations of the matches, merged into a trie of at most `nodes` nodes, the most probable kept."""
        tokens: list[int] = []
        parents: list[int] = []
        log_probs: list[float] = []
        known: dict[tuple[int, int], int] = {}
        for rank, (start, size) in enumerate(self.matches(branches)):
            step = float(np.log(PRIOR[min(size, len(PRIOR) - 1)]))
            parent, total = ROOT, rank * float(np.log(RANK_DISCOUNT))
            for token in self._tokens[start : start + min(nodes, max_depth)]:
                total += step
                node = known.setdefault((parent, token), len(tokens))
                if node == len(tokens):
                    tokens.append(token)
                    parents.append(parent)
                    log_probs.append(min(total, 0.0 if parent == ROOT else log_probs[parent]))
                parent = node
        if not tokens:
            return empty_tree()
        whole = DraftTree(np.array(tokens, np.int64), np.array(parents, np.int64), np.array(log_probs, np.float32))
        return whole.best(nodes, max_depth)


class NGramDrafter:
    """Family F: no graph. Copies from the prompt and the output so far."""

    name = "ngram"
    default_nodes = 8

    def __init__(self, max_n: int = 4, min_n: int = 1, branches: int = 4) -> None:
        self._max_n, self._min_n, self._branches = max_n, min_n, branches
        self._indexes: list[NGramIndex] = []

    def open(self, batch: int) -> None:
        self._indexes = [NGramIndex(self._max_n, self._min_n) for _ in range(batch)]

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        trees = []
        for request in requests:
            index = self._indexes[request.row]
            index.update(request.token_ids)
            trees.append(index.propose(request.max_nodes, request.max_depth, self._branches))
        return trees

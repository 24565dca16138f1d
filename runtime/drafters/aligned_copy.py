"""Copies from a text that the output follows, from where the two are aligned, for as long as they agree.

Two such texts are known: the source, where input and output share a language (input-guided "aggressive decoding",
arXiv 2205.10350: correction, simplification, normal forms), and the previous hypothesis, where a growing input is decoded
again and again (live captions). After a disagreement the copy is re-synchronised: after the longest match of the output's
end, or as if tokens had been replaced or inserted; each is a branch of one tree.
"""

from collections.abc import Callable, Sequence

from headstart.runtime.tree import DraftTree, tree_from_branches

from .base import DraftRequest, DraftSequence, step
from .text_index import TextIndexDrafter

LONGEST_MATCH = 8  # tokens a match is followed back: of two as long, the nearer is the likelier
SURE = 3  # consecutive tokens that agree, the last as predicted, before an older alignment is given up
OTHERS = 2  # further matches that are tried while none is sure
FORGOTTEN = 8  # tokens astray after which the older alignment is no longer used
# A node's class: how its branch is aligned, over how many tokens, and the node's depth. Lists hold each step's lowest.
FOLLOWED, REPLACED, INSERTED, ELSEWHERE = KINDS = (0, 1, 2, 3)
RUNS = (0, 1, 2, 4, 8, 16)
DEPTHS = (1, 2, 3, 5, 9, 17)
# Probability that a copied token is right: by the run of a followed branch; at the first token of the others, and after it.
# Priors, which tuning replaces.
FOLLOWED_PRIOR = (0.6, 0.5, 0.7, 0.85, 0.92, 0.95)
FIRST_PRIOR, DEEPER_PRIOR = {REPLACED: 0.4, INSERTED: 0.25, ELSEWHERE: 0.2}, 0.8


class Alignment:
    """The place of a growing output in the text it follows.

    The output agrees with the text over its last `run` tokens, and would continue at `position`. While `run` is short,
    an older place, `anchor`, is kept, which was left `astray` tokens ago: those tokens may have replaced as many of the
    text's, or have been inserted.
    """

    def __init__(self, text: Sequence[int]) -> None:
        self._text = list(text)
        self._ends: dict[int, list[int]] = {}  # token -> positions after its occurrences
        for position, token in enumerate(self._text):
            self._ends.setdefault(token, []).append(position + 1)
        self._output: list[int] = []
        self.position = self.run = self.anchor = self.astray = 0

    def update(self, output: Sequence[int]) -> None:
        """Follow the output so far, which grew."""
        for token in output[len(self._output) :]:
            self._output.append(token)
            agrees = self._text[self.position : self.position + 1] == [token]
            if agrees:
                self.position, self.run = self.position + 1, self.run + 1
            else:
                self.position, self.run = self._resynchronise(token)
            if agrees and (self.astray == 0 or self.run >= SURE):
                self.anchor, self.astray = self.position, 0
            else:
                self.astray += 1

    def _resynchronise(self, token: int) -> tuple[int, int]:
        """(position after the longest match of the output's end, of equals the one nearest to the expected; its length)."""
        return next(iter(self._matches(token, self.anchor + self.astray + 1)), (len(self._text), 0))

    def _matches(self, token: int, expected: int) -> list[tuple[int, int]]:
        """(position after it, its length) of every match of the output's end: the longest, then the nearest, first."""
        found = [(end, self._length(end)) for end in self._ends.get(token, ())]
        return sorted(found, key=lambda match: (-match[1], abs(match[0] - expected)))

    def _length(self, end: int) -> int:
        output, text, length = self._output, self._text, 1
        while length < min(end, len(output), LONGEST_MATCH) and text[end - 1 - length] == output[-1 - length]:
            length += 1
        return length

    def branches(self, count: int) -> list[tuple[list[int], list[int]]]:
        """(up to `count` token ids, their classes) of every way the output may continue in the text."""
        places = {self.position: (FOLLOWED, self.run)}
        if 0 < self.astray <= FORGOTTEN:
            places.setdefault(self.anchor + self.astray, (REPLACED, self.astray))
            places[self.anchor] = (INSERTED, self.astray)  # even if the output's end matches elsewhere: it went astray here
        if self.astray and 0 < self.run < SURE:
            for end, length in self._matches(self._output[-1], self.anchor + self.astray)[: 1 + OTHERS]:
                places.setdefault(end, (ELSEWHERE, length))
        branches = []
        for start, (kind, run) in places.items():
            token_ids = self._text[start : start + count]
            branches.append((token_ids, [node_class(kind, run, depth) for depth in range(1, len(token_ids) + 1)]))
        return branches


class AlignedCopyDrafter(TextIndexDrafter[Alignment]):
    """Copies from the text that `text_of` takes from the sequence; proposes nothing where that is empty."""

    default_nodes = 16
    class_count = len(KINDS) * len(RUNS) * len(DEPTHS)

    def __init__(self, name: str, text_of: Callable[[DraftSequence], Sequence[int]]) -> None:
        self.name = name
        self._text_of = text_of
        super().__init__()

    def prior_rates(self) -> list[float]:
        return [_prior(kind, run, depth) for kind in KINDS for run in range(len(RUNS)) for depth in range(len(DEPTHS))]

    def new_index(self, sequence: DraftSequence) -> Alignment:
        return Alignment(self._text_of(sequence))

    def draft(self, index: Alignment, request: DraftRequest) -> DraftTree:
        index.update(request.sequence.token_ids[request.sequence.prompt_tokens :])
        branches = index.branches(min(request.max_nodes, request.max_depth))
        return tree_from_branches(branches, self._log_rates).best(request.max_nodes, request.max_depth)


def source_copy() -> AlignedCopyDrafter:
    """Copies the encoder's input."""
    return AlignedCopyDrafter("source_copy", lambda sequence: sequence.source_ids)


def previous_hypothesis() -> AlignedCopyDrafter:
    """Copies the output for the earlier, shorter input."""
    return AlignedCopyDrafter("previous_hypothesis", lambda sequence: sequence.hypothesis_ids)


def node_class(kind: int, run: int, depth: int) -> int:
    """The class of a node of a branch aligned in that way over `run` tokens."""
    return (kind * len(RUNS) + step(RUNS, run)) * len(DEPTHS) + step(DEPTHS, depth)


def _prior(kind: int, run: int, depth: int) -> float:
    if kind == FOLLOWED:
        return FOLLOWED_PRIOR[run]
    return FIRST_PRIOR[kind] if depth == 0 else DEEPER_PRIOR

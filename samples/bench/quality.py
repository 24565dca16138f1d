"""How good the texts are that token ids stand for: the share that is exact, or the word error rate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Quality:
    """A measure with a name, the wanted texts, and how token ids are read."""

    name: str
    measure: Callable[[Sequence[str], Sequence[str]], float]
    targets: list[str]
    text_of: Callable[[list[int]], str]

    def of(self, token_ids: list[list[int]]) -> float:
        """Of one text per target."""
        return self.measure([self.text_of(ids) for ids in token_ids], self.targets)


def exact_share(texts: Sequence[str], targets: Sequence[str]) -> float:
    """Of texts that are their target to the letter; space around them does not count."""
    return sum(text.strip() == target.strip() for text, target in zip(texts, targets, strict=True)) / len(targets)


def word_error_rate(texts: Sequence[str], targets: Sequence[str]) -> float:
    """Words inserted, left out and replaced in all texts, over the words of all targets. Case counts.

    Raises ValueError where the targets hold no word.
    """
    pairs = [(text.split(), target.split()) for text, target in zip(texts, targets, strict=True)]
    words = sum(len(target) for _, target in pairs)
    if not words:
        raise ValueError("The targets hold no word to be wrong about.")
    return sum(edits(text, target) for text, target in pairs) / words


def edits(text: Sequence[str], target: Sequence[str]) -> int:
    """Levenshtein distance, row by row."""
    above = list(range(len(target) + 1))
    for i, word in enumerate(text, 1):
        row = [i]
        for j, wanted in enumerate(target, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != wanted)))
        above = row
    return above[-1]

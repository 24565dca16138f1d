"""How near the texts that a model wrote come to those that were wanted of it."""

from collections.abc import Sequence

from headstart.runtime.errors import OptionError


def exact_share(texts: Sequence[str], targets: Sequence[str]) -> float:
    """Of texts that are their target to the letter; space around them does not count."""
    return sum(text.strip() == target.strip() for text, target in zip(texts, targets, strict=True)) / len(targets)


def word_error_rate(texts: Sequence[str], targets: Sequence[str]) -> float:
    """Words inserted, left out and replaced in all texts, over the words of all targets. Case counts.

    Raises OptionError where the targets hold no word.
    """
    pairs = [(text.split(), target.split()) for text, target in zip(texts, targets, strict=True)]
    words = sum(len(target) for _, target in pairs)
    if not words:
        raise OptionError("The targets hold no word to be wrong about. Fix: leave the targets out, or write what is said.")
    return sum(edits(text, target) for text, target in pairs) / words


def edits(text: Sequence[str], target: Sequence[str]) -> int:
    """The fewest words to insert, leave out or replace (Levenshtein), row by row."""
    above = list(range(len(target) + 1))
    for i, word in enumerate(text, 1):
        row = [i]
        for j, wanted in enumerate(target, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != wanted)))
        above = row
    return above[-1]

"""How near the texts that a model wrote come to their targets."""

from collections.abc import Sequence

from headstart.runtime.errors import MissingExtraError, OptionError


def exact_share(texts: Sequence[str], targets: Sequence[str]) -> float:
    """Of texts that equal their target to the letter; surrounding space does not count."""
    return sum(text.strip() == target.strip() for text, target in zip(texts, targets, strict=True)) / len(targets)


def word_error_rate(texts: Sequence[str], targets: Sequence[str]) -> float:
    """Words inserted, deleted and substituted in all texts, over the words of all targets, by jiwer. Case counts.

    Raises OptionError where the targets hold no word, MissingExtraError without jiwer.
    """
    if not any(target.split() for target in targets):
        raise OptionError("The targets hold no word to be wrong about. Fix: leave the targets out, or write what is said.")
    try:
        import jiwer
    except ModuleNotFoundError as error:
        raise MissingExtraError("The word error rate", "bench") from error
    return float(jiwer.wer(reference=list(targets), hypothesis=list(texts)))

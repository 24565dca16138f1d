"""Which tokens texts use most."""

import itertools
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.bundle import GenerationRules
from headstart.runtime.errors import OptionError
from headstart.runtime.tokenizer import Tokenizer

from .passages import read_texts

MOST_CHARACTERS = 10_000_000  # of the standard library's sources
PIECE = 1_000_000  # characters that are tokenized at once: of a whole file, the tokens would fill the memory
NO_TEXT = {"site-packages", "test", "tests", "idlelib", "encodings", "__pycache__"}


def own_texts() -> Iterator[str]:
    """English and code that every Python has: its standard library, with its documentation strings.

    Raises OptionError where it was installed without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in itertools.chain(root.glob("*.py"), root.glob("*/*.py")) if file.parent.name not in NO_TEXT)
    if not files:
        raise OptionError(f"{root} holds no sources to count tokens in. Fix: --data FILE, a text of the kind to be written.")
    left = MOST_CHARACTERS
    for file in files:
        text = file.read_text("utf-8", errors="replace")
        left -= len(text)
        if left < 0:
            return
        yield text


def texts_of(file: Path | None) -> Iterable[str]:
    """A text file in pieces, or its JSON texts (see `passages.read_texts`); `own_texts` without one. Raises OptionError."""
    return own_texts() if file is None else (piece for text in read_texts(file) for piece in _pieces(text))


def _pieces(text: str) -> Iterator[str]:
    """The text, cut before line breaks, which are tokens too, every PIECE characters or so."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end


def token_counts(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    """How often each token comes."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer.encode(text, special=False))
    return counts


def most_used(counts: Counter[int], tokens: int, vocab_size: int, rules: GenerationRules) -> NDArray[np.int64]:
    """[tokens] in rising order: those that end a text or tell times, then the most frequent, then the lowest.

    The lowest of a vocabulary are its bytes and special tokens, and what was merged first. Tokens that the model has no row
    for, of a tokenizer that knows more of them, are left out.
    """
    no_times = rules.no_timestamps_token_id
    times = range(no_times, vocab_size) if no_times is not None else ()
    frequent = sorted(counts, key=lambda token: (-counts[token], token))
    chosen = dict.fromkeys(itertools.chain(rules.eos_token_ids, times, frequent, range(vocab_size)))
    known = (token for token in chosen if token < vocab_size)
    return np.sort(np.array(list(itertools.islice(known, tokens)), np.int64))


def coverage(counts: Counter[int], token_ids: NDArray[np.int64]) -> float:
    """The share of a text's tokens that are among these."""
    listed = set(token_ids.tolist())
    return sum(count for token, count in counts.items() if token in listed) / max(counts.total(), 1)

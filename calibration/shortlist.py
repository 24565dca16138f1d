"""From texts to a short list in a bundle."""

from dataclasses import dataclass
from pathlib import Path

from headstart.exporter.heads.install import check_place
from headstart.exporter.heads.shortlist import add_shortlist, check_count
from headstart.runtime.bundle import Bundle, HeadInfo
from headstart.runtime.drafters.shortlist import SHORTLIST
from headstart.runtime.errors import OptionError
from headstart.runtime.tokenizer import Tokenizer

from .token_counts import coverage, most_used, texts_of, token_counts

TOKENS = 16384


@dataclass(frozen=True)
class MadeShortlist:
    """A head that was written, and the share of its text's tokens that it lists."""

    info: HeadInfo
    coverage: float


def make_shortlist(
    bundle: str | Path,
    data: Path | None = None,
    tokens: int = TOKENS,
    name: str = SHORTLIST,
    force: bool = False,
) -> MadeShortlist:
    """Count the tokens of a text, and write a short list of the most frequent into a finished bundle.

    Args:
        data: text, or JSONL (see `passages.read_texts`); the sources of Python's standard library where None.
        tokens: to be listed.
        name, force: see `add_shortlist`.

    Raises what `add_shortlist` raises, OptionError for a text that cannot be read or is empty.
    """
    opened = Bundle.load(bundle)
    check_count(opened, tokens)
    check_place(opened, name, force)
    counts = token_counts(Tokenizer.load(opened.path / "tokenizer"), texts_of(data))
    if not counts:
        raise OptionError(f"{data} holds no text to count tokens in. Fix: a text of the kind to be written.")
    listed = most_used(counts, tokens, opened.manifest.model.vocab_size, opened.manifest.generation)
    return MadeShortlist(add_shortlist(bundle, listed, name, force), coverage(counts, listed))

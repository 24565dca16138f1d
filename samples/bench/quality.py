"""How good the texts are that token ids stand for."""

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

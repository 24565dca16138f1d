"""What every drafter gets and gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.cache import CrossState
from headstart.runtime.rules import LogitRule
from headstart.runtime.sampling import SamplingOptions
from headstart.runtime.tree import DraftTree

NO_HIDDEN: NDArray[np.float32] = np.zeros(0, np.float32)


@dataclass(frozen=True)
class DraftRequest:
    """One sequence that wants a draft.

    Attributes:
        row: its row in the batch; the same from round to round.
        token_ids: prompt and output so far; the last is the root, decided but not yet verified.
        hidden: [H] float32, the target's hidden state that decided the root; empty where the drafter does not read it.
        max_nodes: the most nodes the tree may have.
        max_depth: the deepest a node may stand; less than the tree could be only at the end of the text.
        sampling: the user's options; a drafter that samples needs the temperature.
        prompt_tokens: how many of `token_ids` are the prompt.
        rules: the text's own logit rules beside them. Forbidden drafts are merely rejected; a drafter need not look.
        source_ids: the encoder's input, in the tokens of the output; empty where there is none.
        hypothesis_ids: what was decoded for an earlier, shorter input, without prompt; empty where there is none.
    """

    row: int
    token_ids: Sequence[int]
    hidden: NDArray[np.float32]
    max_nodes: int
    max_depth: int
    sampling: SamplingOptions
    prompt_tokens: int = 0
    rules: tuple[LogitRule, ...] = ()
    source_ids: Sequence[int] = ()
    hypothesis_ids: Sequence[int] = ()


class Drafter(Protocol):
    """Anything that proposes tokens."""

    name: str
    default_nodes: int  # tree size used where nothing was tuned
    reads_hidden: bool  # whether the loop fetches the target's hidden states for it

    def open(self, batch: int) -> None:
        """Forget all sequences and prepare for `batch` new ones."""
        ...

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        """One tree per request; an empty tree where there is nothing to propose."""
        ...


@runtime_checkable
class SourceReader(Protocol):
    """A drafter that looks at what the target's encoder reads."""

    def read(self, sources: Sequence[NDArray[Any]], cross: CrossState | None) -> None:
        """The sources of the sequences just opened, as Engine.encode takes them, and what the target's encoder made of them.

        None when the target has no encoder.
        """
        ...


@runtime_checkable
class TunedDrafter(Drafter, Protocol):
    """A drafter that sorts its nodes into classes, and believes the acceptance rates measured for them."""

    class_count: int

    def prior_rates(self) -> list[float]:
        """[class_count] rates believed where nothing was measured."""
        ...

    def use_rates(self, rates: Sequence[float]) -> None:
        """Believe these [class_count] rates from now on: chance of acceptance given that the parent was accepted."""
        ...


def step(steps: Sequence[int], value: int) -> int:
    """Index of the highest of the rising `steps` that `value` reaches; how drafters sort nodes into classes."""
    return sum(value >= lowest for lowest in steps) - 1

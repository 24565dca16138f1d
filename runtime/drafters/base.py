"""What every drafter gets and gives.

A drafter lives by sequence: `open` when a sequence starts, `observe` after every pass of the target with the features of the
rows that were committed (the prompt's too), `propose` whenever a draft may pay, `close` at the end. One drafter serves any
number of sequences at once; all of its state is keyed by `DraftSequence.id`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.graph import Engine
from headstart.runtime.sampling import LogitState, SamplingOptions
from headstart.runtime.states import CrossState
from headstart.runtime.tree import DraftTree

Features = Mapping[str, NDArray[np.float32]]  # output of the target -> [n, H], one row for each committed token


@dataclass
class DraftSequence:
    """One sequence as drafters see it.

    Attributes:
        id: unique among the sequences of a scheduler.
        token_ids: prompt and output so far, growing; the last is the root, decided but not yet verified.
        prompt_tokens: how many of `token_ids` are the prompt.
        sampling: the user's options; a drafter that samples needs the temperature.
        seed: of the drafter's own random stream, which must not share draws with the acceptance tests.
        source: what the encoder reads; None without one.
        source_ids: the encoder's input in the tokens of the output; empty where there is none.
        hypothesis_ids: the output for an earlier, shorter input, without prompt; empty where there is none.
    """

    id: int
    token_ids: list[int]
    prompt_tokens: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: np.random.SeedSequence = field(default_factory=np.random.SeedSequence)
    source: NDArray[Any] | None = None
    source_ids: Sequence[int] = ()
    hypothesis_ids: Sequence[int] = ()


@dataclass(frozen=True)
class DraftRequest:
    """One sequence that wants a draft.

    Attributes:
        sequence: the text so far.
        logits: the state of its logit rules at the root; fork it, never advance it.
        max_nodes: the most nodes the tree may have.
        max_depth: the deepest a node may be; only near the end of the text less than the tree could be.
    """

    sequence: DraftSequence
    logits: LogitState
    max_nodes: int
    max_depth: int


@dataclass(frozen=True)
class Target:
    """The model that is drafted for.

    Attributes:
        engine: its graphs; an early exit or a head that reads the target's keys and values runs on it.
        sources: the encoded source of the sequence that is opened; None without an encoder.
    """

    engine: Engine
    sources: CrossState | None = None


class Drafter(Protocol):
    """Anything that proposes tokens.

    A drafter sorts its nodes into `class_count` classes (by depth, confidence, length of a match …), whose acceptance rates
    tuning measures.
    """

    name: str
    default_nodes: int  # tree size where no budget decides
    class_count: int

    @property
    def reads(self) -> frozenset[str]:
        """Outputs of the target that `observe` needs: contract.HIDDEN, contract.AUX_HIDDEN, or none."""
        ...

    def prior_rates(self) -> list[float]:
        """[class_count] rates assumed before anything is measured."""
        ...

    def use_rates(self, rates: Sequence[float]) -> None:
        """Use these [class_count] rates: probability of acceptance given that the parent was accepted."""
        ...

    def open(self, sequence: DraftSequence, target: Target) -> None:
        """Prepare for a new sequence."""
        ...

    def observe(self, sequence: DraftSequence, rows: Features, path: Sequence[int]) -> None:
        """Take the features of newly committed rows, whose tokens are `path`. The last row decided the present root."""
        ...

    def price(self, nodes: int, depth: int) -> float:
        """Milliseconds that a proposal of that size is expected to take."""
        ...

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        """One tree per request; an empty tree where there is nothing to propose."""
        ...

    def taken_back(self, sequence: DraftSequence, known: int) -> None:
        """All tokens but the first `known` were provisional, and others may be in their place now. Their features come next."""
        ...

    def close(self, sequence: DraftSequence) -> None:
        """Forget a sequence. Closing one that was never opened is not an error."""
        ...


class PriceMeter:
    """Running estimate of what a proposal takes, from the proposals made so far."""

    WEIGHT = 0.1  # of the newest proposal

    def __init__(self) -> None:
        self.milliseconds = 0.0
        self._count = 0

    @contextmanager
    def measure(self, requests: int) -> Iterator[None]:
        """Time the block, which proposes for that many sequences."""
        started = time.perf_counter()
        yield
        self._add(1000 * (time.perf_counter() - started) / max(requests, 1))

    def _add(self, milliseconds: float) -> None:
        self._count += 1
        weight = max(self.WEIGHT, 1 / self._count)  # a plain mean at first
        self.milliseconds += weight * (milliseconds - self.milliseconds)


def step(steps: Sequence[float], value: float) -> int:
    """Index of the highest of the rising `steps` that `value` reaches; how drafters sort nodes into classes."""
    return sum(value >= lowest for lowest in steps) - 1

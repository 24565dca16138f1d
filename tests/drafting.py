"""Requests for drafters, without a scheduler."""

from collections.abc import Sequence
from typing import Any

from headstart.runtime.drafters.base import DraftRequest, DraftSequence
from headstart.runtime.sampling import LogitRules, SamplingOptions


def draft_request(
    token_ids: Sequence[int],
    nodes: int = 8,
    depth: int = 8,
    row: int = 0,
    prompt_tokens: int = 0,
    source: Sequence[int] = (),
) -> DraftRequest:
    """Of the sequence with the id `row`, greedy and without rules."""
    options = SamplingOptions()
    sequence = DraftSequence(row, list(token_ids), prompt_tokens, options, source_ids=source)
    return DraftRequest(sequence, LogitRules(options).start(token_ids), nodes, depth)


def opened(drafter: Any, *requests: DraftRequest) -> Any:
    """The drafter, with those requests' sequences open. None of the drafters of text reads the target."""
    for request in requests:
        drafter.open(request.sequence, None)
    return drafter

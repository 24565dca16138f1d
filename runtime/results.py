"""What a generation returns."""

from dataclasses import dataclass

from .sequence import FinishReason, Sequence, TokenLogProbs


@dataclass(frozen=True)
class Stats:
    """What one generation cost. Times are of the passes it took part in, which it may have shared with others.

    Attributes:
        drafter: the drafter used, "none" for plain decoding.
        verify_calls: target passes after the prompt.
        acceptance_length: new tokens per verify call, the target's own token included; 1.0 is plain decoding.
        drafted_tokens: tree nodes verified.
        prefill_s, decode_s: seconds.
        tokens_per_s: new tokens after the first, per second of decoding.
    """

    drafter: str
    verify_calls: int
    acceptance_length: float
    drafted_tokens: int
    prefill_s: float
    decode_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Result:
    """One completed text.

    Attributes:
        text: what was added to the prompt.
        token_ids: the same in tokens.
        prompt_tokens: what the decoder read before its own tokens.
        finish_reason: why it ended.
        stats: what it cost.
        log_probs: of each token, where they were asked for.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    stats: Stats
    log_probs: tuple[TokenLogProbs, ...] = ()


def stats_of(sequence: Sequence) -> Stats:
    """What a finished sequence cost."""
    decoded, clock = max(sequence.new_tokens - 1, 0), sequence.clock  # the first comes from the prompt's own pass
    drafter = sequence.request.drafter
    return Stats(
        drafter=drafter.name if drafter else "none",
        verify_calls=sequence.verify_calls,
        acceptance_length=decoded / sequence.verify_calls if sequence.verify_calls else 1.0,
        drafted_tokens=sequence.drafted_tokens,
        prefill_s=clock.prefill_s,
        decode_s=clock.decode_s,
        tokens_per_s=decoded / clock.decode_s if clock.decode_s else 0.0,
    )

"""The options of a generation: typed keywords for callers, checked against what the model states."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from typing_extensions import TypedDict

from .acceptance import check_rule
from .bundle import GenerationRules
from .errors import OptionError
from .rules import LogitRule, TokenRules
from .sampling import SamplingOptions

MAX_NEW_TOKENS = 128


class DecodeOptions(TypedDict, total=False):
    """Keywords of `Model.transcribe` and `stream_audio`, and most of those of `generate`.

    max_new_tokens: the most tokens to add; the checkpoint's own limit, else 128.
    drafter: "auto" (as tuned; n-grams where they pay, before), "none", or a name from `Model.drafters`.
    draft_nodes: fixed size of the draft tree; by default what pays.
    acceptance: name of an acceptance rule; by default the lossless one that fits the draft.
    lossy: allow an acceptance rule that changes the output's distribution.
    temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram, seed: see SamplingOptions; the checkpoint's own
        repetition_penalty and no_repeat_ngram where None.
    stop: texts that end the completion; they are not part of it.
    ignore_end: continue after the model's end token.
    logprobs: return each token's log-probability, and those of so many alternatives.
    logit_rules: the caller's own rules of which token may follow (see `rules.LogitRule`), applied after all others; drafts are
        verified under them as under any rule.
    """

    max_new_tokens: int | None
    drafter: str
    draft_nodes: int | None
    acceptance: str | None
    lossy: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float | None
    no_repeat_ngram: int | None
    seed: int | None
    stop: str | Sequence[str]
    ignore_end: bool
    logprobs: int | None
    logit_rules: Sequence[LogitRule]


class GenerateOptions(DecodeOptions, total=False):
    """Keywords of `Model.generate` and `stream`: those of DecodeOptions, and

    hypotheses: per prompt, the token ids decoded of an earlier, shorter input; "auto" then drafts from them.
    timestamps: apply Whisper's rules for them; the decoder prompt must not forbid them.
    """

    hypotheses: Sequence[Sequence[int]]
    timestamps: bool


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


@dataclass(frozen=True)
class GenerateSettings:
    """Options whose defaults are filled in, but for the limit (see `most_new_tokens`); see GenerateOptions."""

    sampling: SamplingOptions
    rules: TokenRules
    end_tokens: frozenset[int]
    max_new_tokens: int | None = None
    drafter: str = "auto"
    draft_nodes: int | None = None
    acceptance: str | None = None
    stop: tuple[str, ...] = ()
    hypotheses: Sequence[Sequence[int]] = field(default=(), repr=False)
    logprobs: int | None = None


def settings(options: GenerateOptions, stated: GenerationRules) -> GenerateSettings:
    """Raises OptionError for an unknown option, or a value that an option cannot have."""
    values: Mapping[str, Any] = options
    known = get_type_hints(GenerateOptions)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise OptionError(f"unknown option {unknown[0]!r}. Options are: {', '.join(known)}.")
    ends = not options.get("ignore_end", False)
    acceptance = options.get("acceptance")
    if acceptance is not None:
        check_rule(acceptance, options.get("lossy", False))
    stop = options.get("stop", ())
    return GenerateSettings(
        sampling=sampling_options(options, stated),
        rules=TokenRules.of(stated, options.get("timestamps", False), ends, tuple(options.get("logit_rules", ()))),
        end_tokens=frozenset(stated.eos_token_ids) if ends else frozenset(),
        max_new_tokens=options.get("max_new_tokens"),
        drafter=options.get("drafter", "auto"),
        draft_nodes=options.get("draft_nodes"),
        acceptance=acceptance,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        hypotheses=options.get("hypotheses", ()),
        logprobs=options.get("logprobs"),
    )


def sampling_options(options: GenerateOptions, stated: GenerationRules) -> SamplingOptions:
    """The user's options, and the model's own where the user says nothing."""
    values: Mapping[str, Any] = options
    given = {name: values[name] for name in SAMPLING if name in values}
    chosen = SamplingOptions(suppress_tokens=stated.suppress_tokens, **given)
    size, penalty = options.get("no_repeat_ngram"), options.get("repetition_penalty")
    return dataclasses.replace(
        chosen,
        no_repeat_ngram=stated.no_repeat_ngram_size if size is None else size,
        repetition_penalty=stated.repetition_penalty if penalty is None else penalty,
    )


def most_new_tokens(wanted: int | None, stated: GenerationRules, prompt_tokens: int) -> int:
    """The user's limit, else the checkpoint's own, else MAX_NEW_TOKENS. A checkpoint's `max_length` counts the prompt, too."""
    if wanted is not None:
        return wanted
    if stated.max_new_tokens is not None:
        return stated.max_new_tokens
    if stated.max_length is not None and stated.max_length > prompt_tokens:
        return stated.max_length - prompt_tokens
    return MAX_NEW_TOKENS

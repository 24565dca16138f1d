"""One call of `generate`: prompts go through the decoding loop and come out as text, with what that cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .bundle import GenerationRules
from .drafters.aligned_copy import previous_hypothesis
from .errors import OptionError, PromptError
from .loop import DecodingLoop, FinishReason, LoopOptions, Text
from .rules import TokenRules
from .sampling import SamplingOptions
from .tokenizer import TextStream

if TYPE_CHECKING:
    from .model import Model

Prompt = str | Path | NDArray[Any]  # text; for encoders of speech a sound file of one window, or its features


@dataclass(frozen=True)
class Stats:
    """What one generation cost. Times are of the whole batch it ran in.

    Attributes:
        drafter: the drafter used, "none" for plain decoding.
        verify_calls: target forwards after the prompt.
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
    """One completed text: what was added to the prompt. `prompt_tokens` counts what the decoder read before its own tokens."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    stats: Stats


class Generation:
    """One call of generate or stream: the loop, one text stream per prompt, and the results."""

    def __init__(
        self,
        model: "Model",
        prompts: Sequence[Prompt],
        max_new_tokens: int = 128,
        drafter: str = "auto",
        draft_nodes: int | None = None,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
        decoder_prompt: str | Sequence[int] = (),
        hypotheses: Sequence[Sequence[int]] = (),
        timestamps: bool = False,
        **sampling: Any,
    ) -> None:
        check_given(prompts)
        if hypotheses and len(hypotheses) != len(prompts):
            raise OptionError(f"There must be one hypothesis for each of the {len(prompts)} prompts, got {len(hypotheses)}.")
        stated = model.bundle.manifest.generation
        ends = frozenset() if ignore_end else frozenset(stated.eos_token_ids)
        self._drafter = previous_hypothesis() if hypotheses and drafter == "auto" else model.drafter(drafter)
        chosen = sampling_options(sampling, stated)
        options = LoopOptions(
            max_new_tokens,
            chosen,
            ends,
            draft_nodes,
            lambda: model.budget(self._drafter, chosen.greedy),
            TokenRules.of(stated, timestamps, not ignore_end),
            hypotheses,
        )
        self._tokenizer = model.tokenizer
        self._stop = [stop] if isinstance(stop, str) else list(stop)
        inputs = [model.inputs(prompt, decoder_prompt) for prompt in prompts]
        sources = [source for source, _ in inputs if source is not None]
        self._loop = DecodingLoop(model.engine, self._drafter, [ids for _, ids in inputs], options, sources)
        self._streams = [TextStream(self._tokenizer, self._stop) for _ in prompts]
        self._texts = ["" for _ in prompts]

    def pieces(self) -> Iterator[list[str]]:
        """After each round, the text that became final for each prompt."""
        for emitted in self._loop.rounds():
            yield [self._show(text, tokens) for text, tokens in zip(self._loop.sequences, emitted, strict=True)]

    def _show(self, text: Text, tokens: list[int]) -> str:
        if not tokens:
            return ""
        stream = self._streams[text.row]
        piece = stream.push(tokens)
        if stream.stopped:
            text.finish_reason = "stop_string"
            del text.token_ids[text.prompt_tokens + stream.token_count :]
        if text.finish_reason is not None:
            piece += stream.finish()
        self._texts[text.row] += piece
        return piece

    def results(self) -> list[Result]:
        """What was generated, once `pieces` is exhausted."""
        return [self._result(text) for text in self._loop.sequences]

    def _result(self, text: Text) -> Result:
        assert text.finish_reason is not None
        return Result(
            self._texts[text.row],
            text.token_ids[text.prompt_tokens :],
            text.prompt_tokens,
            text.finish_reason,
            self._stats(text),
        )

    def _stats(self, text: Text) -> Stats:
        clock = self._loop.clock
        decoded = text.new_tokens - 1  # the first comes from the prompt's own forward
        return Stats(
            drafter=self._drafter.name if self._drafter else "none",
            verify_calls=text.verify_calls,
            acceptance_length=decoded / text.verify_calls if text.verify_calls else 1.0,
            drafted_tokens=text.drafted_tokens,
            prefill_s=clock.prefill_s,
            decode_s=clock.decode_s,
            tokens_per_s=decoded / clock.decode_s if clock.decode_s else 0.0,
        )


def check_given(prompts: Sequence[Prompt]) -> None:
    """Raises PromptError for no prompts, and for one that is empty."""
    if not prompts or any(prompt.size == 0 if isinstance(prompt, np.ndarray) else prompt == "" for prompt in prompts):
        raise PromptError("The prompt is empty: decoding needs some text to start from.")


def sampling_options(values: dict[str, Any], stated: GenerationRules) -> SamplingOptions:
    """The user's options, and the model's own where the user says nothing."""
    try:
        if values.get("no_repeat_ngram") is None:
            values = values | {"no_repeat_ngram": stated.no_repeat_ngram_size}
        return SamplingOptions(suppress_tokens=stated.suppress_tokens, **values)
    except TypeError as error:
        known = ", ".join(name for name in SamplingOptions.__dataclass_fields__ if name != "suppress_tokens")
        raise OptionError(f"unknown option ({error}). Sampling options are: {known}.") from error

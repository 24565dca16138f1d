"""What decoding decides from logits: the text's own rules and the sampling options, applied to a reference's logits."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.model import Model, Prompt
from headstart.runtime.options import sampling_options
from headstart.runtime.rules import TokenRules
from headstart.runtime.sampling import LogitRules

from .passes import Logits, Source


@dataclass(frozen=True)
class Request:
    """One call of generate as the decoder sees it.

    Attributes:
        start: the token ids that the decoder starts from.
        rules: the options, and the rules of the model and of this text.
    """

    prompt: Prompt
    decoder_prompt: tuple[int, ...]
    source: Source
    start: tuple[int, ...]
    rules: LogitRules

    def processed(self, tokens: Sequence[int], logits: Logits) -> Iterator[Logits]:
        """[V] logits after the rules at each position of the output `tokens`, of [len(tokens), V] raw ones."""
        state = self.rules.start(self.start)
        for row, token in zip(logits, tokens, strict=True):
            yield state.process(row)
            state.advance(token)

    def probabilities(self, tokens: Sequence[int], logits: Logits) -> NDArray[np.float64]:
        """[V] the distribution of the token after the output `tokens`, from [V] raw logits."""
        return self.rules.start([*self.start, *tokens]).probabilities(logits)


def request_of(
    model: Model, prompt: Prompt, max_new_tokens: int, ignore_end: bool, decoder_prompt: Sequence[int] = (), **sampling: Any
) -> Request:
    """The rules that `Model.generate` applies to the same arguments. Raises PromptError for a prompt it refuses."""
    stated, info = model.bundle.manifest.generation, model.bundle.manifest.model
    given = model.input(prompt, decoder_prompt)
    source, start = given.source, given.prompt_ids
    options = dataclasses.replace(sampling_options({}, stated), **sampling)
    ends = frozenset() if ignore_end else frozenset(stated.eos_token_ids)
    longest = min(info.max_cache, len(start) + max_new_tokens)
    rules = TokenRules.of(stated, False, not ignore_end).for_text(len(start), longest, ends, given.source_ids(info.source))
    return Request(prompt, tuple(decoder_prompt), source, tuple(start), LogitRules(options, rules))

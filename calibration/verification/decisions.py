"""What decoding decides from logits: the text's own rules and the sampling options, applied to a reference's logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from headstart.runtime.model import Model, Prompt
from headstart.runtime.options import GenerateOptions, most_new_tokens, settings
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


def request_of(model: Model, prompt: Prompt, decoder_prompt: Sequence[int] = (), **options: Unpack[GenerateOptions]) -> Request:
    """The rules that `Model.generate` applies to the same arguments. Raises as it does."""
    given, info = model.input(prompt, decoder_prompt), model.bundle.manifest.model
    chosen = settings(options, model.bundle.manifest.generation)
    most = most_new_tokens(chosen.max_new_tokens, model.bundle.manifest.generation, len(given.prompt_ids))
    longest = min(info.max_cache, len(given.prompt_ids) + most)
    source_ids = given.source_ids(info.source)
    rules = chosen.rules.for_text(len(given.prompt_ids), longest, chosen.end_tokens, source_ids)
    return Request(prompt, tuple(decoder_prompt), given.source, given.prompt_ids, LogitRules(chosen.sampling, rules))

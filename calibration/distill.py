"""Training data for draft heads: the base model's own continuations, and its hidden states over them.

Heads must predict what the base will say, so the base itself writes the text (self-distillation): prompts are cut from
the user's files and continued, half of them greedily and half sampled. The base is frozen, so its hidden states are
computed once and a training step costs the heads alone.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart.runtime.errors import OptionError

Progress = Callable[[str, int, int], None]  # what, done, of
IGNORED = -100  # stands behind the end of a text that is shorter than others


@dataclass(frozen=True)
class DistillOptions:
    """How the text is made.

    Attributes:
        prompt_tokens, new_tokens: of each sequence; of encoder-decoders only the second counts, as the most.
        sequences: how many the base writes.
        batch: sequences generated at once.
        temperature: of the sampled half, of decoders.
        original: share of further sequences that are the files' own text, of decoders.
    """

    prompt_tokens: int = 64
    new_tokens: int = 192
    sequences: int = 1024
    batch: int = 32
    temperature: float = 0.7
    original: float = 0.25

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "sequences", "batch"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.temperature <= 0:
            raise OptionError(f"temperature must be above 0, got {self.temperature}: half of the text is greedy already.")
        if self.original < 0:
            raise OptionError(f"original must be at least 0, got {self.original}.")


@dataclass(frozen=True)
class HiddenData:
    """[N, T] tokens, IGNORED behind a text's end, and the [N, T, H] float16 hidden states the LM head read at them."""

    token_ids: Tensor
    hidden: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)


def read_tokens(tokenizer: Any, files: list[Path]) -> NDArray[np.int64]:
    """All files' tokens behind one another, [tokens]. Raises OptionError for an unreadable or too small set."""
    if not files:
        raise OptionError("No training files were given. Fix: --data FILE, repeated, or a folder of text files.")
    pieces = []
    for file in files:
        try:
            pieces.append(np.array(tokenizer(file.read_text("utf-8"))["input_ids"], np.int64))
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"{file} cannot be read as UTF-8 text ({error}).") from error
    return np.concatenate(pieces)


def cut(tokens: NDArray[np.int64], length: int, count: int, seed: int) -> Tensor:
    """[count, length] windows at random places."""
    if len(tokens) < 4 * length:
        raise OptionError(f"The training files hold {len(tokens)} tokens; at least {4 * length} are needed. Fix: more files.")
    if count == 0:
        return torch.empty(0, length, dtype=torch.int64)
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length, count)
    return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]))


def distill(model: Any, tokens: NDArray[np.int64], options: DistillOptions, seed: int, progress: Progress) -> HiddenData:
    """Let the base continue prompts cut from `tokens`, add original text, and record hidden states over all of it."""
    written = torch.cat(list(_continuations(model, tokens, options, seed, progress)))
    length = options.prompt_tokens + options.new_tokens
    original = cut(tokens, length, int(options.sequences * options.original), seed + 1)
    token_ids = torch.cat([written, original])
    hidden = torch.empty(*token_ids.shape, hidden_size(model), dtype=torch.float16)
    batches = range(0, len(token_ids), options.batch)
    for done, start in enumerate(batches):
        rows = slice(start, start + options.batch)
        hidden[rows] = hidden_states(model, {"input_ids": token_ids[rows]})
        progress("hidden states", done + 1, len(batches))
    return HiddenData(token_ids, hidden)


def hidden_size(model: Any) -> int:
    """Of what the output embedding reads."""
    return int(model.get_output_embeddings().weight.shape[1])


def check_memory(model: Any, options: DistillOptions) -> None:
    """Raises OptionError when the hidden states, all kept in memory, would not fit; before an hour is spent on them."""
    if model.config.is_encoder_decoder:
        rows = options.sequences * options.new_tokens
    else:
        rows = int(options.sequences * (1 + options.original)) * (options.prompt_tokens + options.new_tokens)
    needed, free = 2 * rows * hidden_size(model), _free_memory_bytes()
    if needed > free:
        raise OptionError(
            f"The hidden states of {options.sequences} sequences need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are "
            f"free. Fix: --sequences {max(1, options.sequences * free // needed // 2)}."
        )


def _free_memory_bytes() -> int:
    """What Linux says a new allocation can have, page cache included; without limit where there is no such file."""
    file = Path("/proc/meminfo")
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    kibibytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return sys.maxsize if kibibytes is None else 1024 * int(kibibytes)


def _continuations(
    model: Any, tokens: NDArray[np.int64], options: DistillOptions, seed: int, progress: Progress
) -> Iterator[Tensor]:
    prompts = cut(tokens, options.prompt_tokens, options.sequences, seed)
    torch.manual_seed(seed)
    batches = prompts.split(options.batch)
    for done, batch in enumerate(batches):
        yield _continue(model, batch, options, sampled=done % 2 == 1)
        progress("self-distillation", done + 1, len(batches))


@torch.no_grad()
def _continue(model: Any, prompts: Tensor, options: DistillOptions, sampled: bool) -> Tensor:
    """[B, prompt + new] tokens: a plain loop over the model's cache, which no end token cuts short."""
    out = model(input_ids=prompts, use_cache=True)
    tokens = [prompts]
    for _ in range(options.new_tokens):
        logits = out.logits[:, -1]
        if sampled:
            token = torch.multinomial(torch.softmax(logits / options.temperature, -1), 1)
        else:
            token = logits.argmax(-1, keepdim=True)
        tokens.append(token)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def hidden_states(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, T, H]: what the output embedding reads, after the final norm; `inputs` as the model's forward takes them."""
    captured: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return captured[0]

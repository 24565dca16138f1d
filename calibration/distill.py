"""Training data for draft heads: the base model's own continuations, and its hidden states over them.

Heads must predict what the base will say, so the base itself writes the text (self-distillation): prompts are cut from
the user's files and continued, half of them greedily and half sampled. The base is frozen, so its hidden states are
computed once and a training step costs the heads alone.

Every batch is a piece of its own, seeded by its number: an interrupted run goes on at the next one.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart.runtime.errors import OptionError

from .work_folder import Keep, Tensors, made_anew

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
    """N texts of T tokens.

    Attributes:
        token_ids: [N, T], IGNORED behind a text's end.
        hidden: [N, T, H] float16, the states that the LM head read at them.
        labels: [N, T] what heads should propose for them, where that is not the tokens' own numbers.
    """

    token_ids: Tensor
    hidden: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, rows: Tensor | slice) -> "HiddenData":
        labels = None if self.labels is None else self.labels[rows]
        return HiddenData(self.token_ids[rows], self.hidden[rows], labels)


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


def cut(tokens: NDArray[np.int64], opening: Sequence[int], length: int, count: int, seed: int) -> Tensor:
    """[count, length] windows at random places, each with the special tokens that open a text."""
    if len(tokens) < 4 * length:
        raise OptionError(f"The training files hold {len(tokens)} tokens; at least {4 * length} are needed. Fix: more files.")
    if count == 0:
        return torch.empty(0, length, dtype=torch.int64)
    size = length - len(opening)
    starts = np.random.default_rng(seed).integers(0, len(tokens) - size, count)
    return torch.from_numpy(np.stack([[*opening, *tokens[start : start + size]] for start in starts]))


def distill(
    model: Any,
    tokens: NDArray[np.int64],
    options: DistillOptions,
    seed: int,
    progress: Progress,
    opening: Sequence[int] = (),
    keep: Keep = made_anew,
) -> HiddenData:
    """Let the base continue prompts cut from `tokens`, add original text, and record hidden states over all of it.

    Args:
        opening: the special tokens that a text begins with.
    """
    prompts = cut(tokens, opening, options.prompt_tokens, options.sequences, seed).split(options.batch)
    length = options.prompt_tokens + options.new_tokens
    original = cut(tokens, opening, length, int(options.sequences * options.original), seed + 1).split(options.batch)
    pieces = []
    for index, batch in enumerate(prompts):
        pieces.append(keep(f"continued-{index}", partial(_continued, model, batch, options, seed, index)))
        progress("self-distillation", index + 1, len(prompts))
    for index, batch in enumerate(original):
        if len(batch):
            pieces.append(keep(f"original-{index}", partial(_read, model, batch)))
            progress("hidden states", index + 1, len(original))
    return HiddenData(torch.cat([piece["token_ids"] for piece in pieces]), torch.cat([piece["hidden"] for piece in pieces]))


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


@torch.no_grad()
def _continued(model: Any, prompts: Tensor, options: DistillOptions, seed: int, index: int) -> Tensors:
    """[B, prompt + new] tokens and the states over them: a plain loop over the model's cache, which no end token cuts short."""
    torch.manual_seed(seed + index)
    tokens, states = [prompts], []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: states.append(args[0].half()))
    try:
        out = model(input_ids=prompts, use_cache=True)
        for _ in range(options.new_tokens):
            tokens.append(_next_token(out.logits[:, -1], options.temperature if index % 2 else None))
            out = model(input_ids=tokens[-1], past_key_values=out.past_key_values, use_cache=True)
    finally:
        hook.remove()
    return {"token_ids": torch.cat(tokens, dim=1), "hidden": torch.cat(states, dim=1)}


def _next_token(logits: Tensor, temperature: float | None) -> Tensor:
    """[B, V] to [B, 1]: sampled, or the best one without a temperature."""
    if temperature is None:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1)


def _read(model: Any, token_ids: Tensor) -> Tensors:
    return {"token_ids": token_ids, "hidden": hidden_states(model, {"input_ids": token_ids}).half()}


class _ReachedLmHeadError(Exception):
    """Its argument is the state that the LM head was about to read."""


def _stop(module: Any, arguments: tuple[Tensor, ...]) -> None:
    raise _ReachedLmHeadError(arguments[0])


@torch.no_grad()
def hidden_states(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, T, H]: what the output embedding reads, after the final norm; `inputs` as the model's forward takes them.

    The model stops there: with a large vocabulary the LM head is most of the work.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(_stop)
    try:
        model(**inputs, use_cache=False)
    except _ReachedLmHeadError as reached:
        states: Tensor = reached.args[0]
        return states
    finally:
        hook.remove()
    raise AssertionError("the model computed logits without its output embedding")

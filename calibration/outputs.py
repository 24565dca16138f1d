"""Training data for draft heads of encoder-decoders: the base's own outputs for the user's sources.

The counterpart of `distill` where there is nothing to continue: the base reads a source (text, or speech as features) and
writes its greedy output, which ends of itself, so that texts differ in length.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.runtime.errors import OptionError
from headstart.runtime.prompts import read_prompts

from .distill import IGNORED, DistillOptions, HiddenData, Progress, hidden_states
from .work_folder import Keep, Tensors, made_anew

LONGEST_SOURCE = 512  # tokens, where neither tokenizer nor model names a limit
Inputs = Mapping[str, Tensor]  # of the model's encoder: [B, …] each


def text_inputs(model: Any, tokenizer: Any, files: Sequence[Path], options: DistillOptions, seed: int) -> list[Inputs]:
    """`options.sequences` sources of the files, one a line or JSON object, in padded batches of like length.

    Raises OptionError for no files, PromptError for one that cannot be read.
    """
    if not files:
        raise OptionError("No training files were given. Fix: --data FILE, repeated, or a folder of text files.")
    sources = [text for file in files for text in read_prompts(file)]
    random.Random(seed).shuffle(sources)
    limit = min(tokenizer.model_max_length, _positions(model) or LONGEST_SOURCE)
    token_ids = tokenizer(sources[: options.sequences], truncation=True, max_length=limit)["input_ids"]
    token_ids.sort(key=len)
    batches = [token_ids[start : start + options.batch] for start in range(0, len(token_ids), options.batch)]
    return [dict(tokenizer.pad({"input_ids": rows}, return_tensors="pt")) for rows in batches]


def distill_outputs(
    model: Any, batches: Sequence[Inputs], options: DistillOptions, progress: Progress, keep: Keep = made_anew
) -> HiddenData:
    """The base's outputs for `batches` and the hidden states over them; "decoder_input_ids" may say how an output begins."""
    pieces = []
    for index in range(len(batches)):
        pieces.append(keep(f"outputs-{index}", partial(_output, model, batches, index, options)))
        progress("self-distillation", index + 1, len(batches))
    longest = max(piece["token_ids"].shape[1] for piece in pieces)
    return HiddenData(
        torch.cat([_longer(piece["token_ids"], longest, IGNORED) for piece in pieces]),
        torch.cat([_longer(piece["hidden"], longest, 0) for piece in pieces]),
    )


def _output(model: Any, batches: Sequence[Inputs], index: int, options: DistillOptions) -> Tensors:
    """Of one batch, whose features may be computed on access."""
    inputs = batches[index]
    written = write(model, inputs, options.new_tokens)
    states = hidden_states(model, {**inputs, "decoder_input_ids": written})
    return {"token_ids": ended(written, _end_ids(model)), "hidden": states.half()}


def write(model: Any, inputs: Inputs, new_tokens: int) -> Tensor:
    """[B, T] greedy outputs, start token first, padded behind the end; by the model's own generation rules."""
    from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin

    room = _positions(model)
    given = inputs["decoder_input_ids"].shape[1] if "decoder_input_ids" in inputs else 1
    longest = new_tokens if room is None else min(new_tokens, room - given)
    # generate() would make a cache of as many layers as some encoders have, whatever the decoder has.
    greedy = {"do_sample": False, "num_beams": 1, "past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}
    with torch.no_grad():  # the mixin's method, for speech models put windows and segments around it
        written: Tensor = GenerationMixin.generate(model, **inputs, **greedy, max_new_tokens=longest)
    return written


def _positions(model: Any) -> int | None:
    """Tokens there are learned positions for; None where positions are relative."""
    names = ("max_position_embeddings", "max_target_positions")
    return next((size for name in names if (size := getattr(model.config, name, None)) is not None), None)


def ended(token_ids: Tensor, end_ids: Iterable[int]) -> Tensor:
    """[B, T] with IGNORED behind each row's first end token; the start token may be one itself."""
    is_end = torch.isin(token_ids, torch.tensor(list(end_ids)))
    is_end[:, 0] = False
    behind = is_end.int().cumsum(1) - is_end.int() > 0
    return token_ids.masked_fill(behind, IGNORED)


def _end_ids(model: Any) -> Iterator[int]:
    end = model.generation_config.eos_token_id
    yield from () if end is None else (end,) if isinstance(end, int) else end


def _longer(rows: Tensor, length: int, filler: int) -> Tensor:
    """[B, T, …] to [B, length, …]."""
    more = rows.new_full((rows.shape[0], length - rows.shape[1], *rows.shape[2:]), filler)
    return torch.cat([rows, more], dim=1)

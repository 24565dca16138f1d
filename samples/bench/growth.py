"""What growing a Llama, a T5 and a Whisper have in common: placing old numbers among new ones, and reading the old."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from headstart.runtime.errors import CheckpointError, OptionError


@dataclass(frozen=True)
class EncoderDecoderSize:
    """The grown shape of an encoder-decoder, both halves as wide."""

    hidden: int
    mlp: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    head_size: int

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise OptionError(f"The target's hidden size must be a multiple of {self.heads}, found {self.hidden}.")

    @property
    def inner(self) -> int:
        return self.heads * self.head_size


def place(old: Tensor, shape: tuple[int, ...], rows: list[int], columns: list[int], noise: torch.Generator | None) -> Tensor:
    """`old` at rows × columns of a matrix of `shape`; around it noise of its own spread, or zeros without `noise`."""
    new = torch.zeros(shape) if noise is None else torch.randn(shape, generator=noise) * old.float().std()
    new[torch.tensor(rows)[:, None], torch.tensor(columns)] = old.float()
    return new


def silence_grown_dims(weight: Tensor, kept: list[int], head_size: int) -> None:
    """Zero the rows of the old heads that are not old rows."""
    heads = {row // head_size for row in kept}
    rows = {head * head_size + d for head in heads for d in range(head_size)} - set(kept)
    weight[sorted(rows)] = 0


def head_rows(heads: int, old_size: int, new_size: int) -> list[int]:
    """Where the rows of `heads` heads go: each keeps its number and stands first in its grown head."""
    return [h * new_size + d for h in range(heads) for d in range(old_size)]


def placed_layers(old: int, new: int) -> list[tuple[int, bool]]:
    """(old layer to copy, whether this is its place) for each new layer: the old ones stand evenly among the new."""
    places = [i * new // old for i in range(old)]
    return [(max(i for i, at in enumerate(places) if at <= index), index in places) for index in range(new)]


def check_grows(extents: Iterable[tuple[str, int, int]]) -> None:
    """Raises CheckpointError for the first (what, now, then) that would shrink."""
    for what, now, then in extents:
        if then < now:
            raise CheckpointError(
                f"The checkpoint's {what} is {now}, the target's {then}: growing only adds. Fix: a larger --size."
            )


def model_type(checkpoint: Path) -> str | None:
    """What config.json names. Raises CheckpointError when it cannot be read."""
    file = checkpoint / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not a readable JSON file: {error}. Fix: a Hugging Face checkpoint folder.") from error
    return config.get("model_type") if isinstance(config, dict) else None


def load_small(kind: Any, checkpoint: Path) -> Any:
    """The checkpoint as a model of class `kind`, in float32. Raises CheckpointError without readable weights."""
    try:
        return kind.from_pretrained(checkpoint, dtype=torch.float32)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise CheckpointError(f"{checkpoint} has no readable weights: {reason}. Fix: fetch the checkpoint anew.") from error

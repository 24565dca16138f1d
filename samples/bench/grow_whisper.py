"""Growing a Whisper, in the way of grow.py, but LayerNorm subtracts a mean, which zeros would move.

So the residual stream is repeated: m copies of the old one, which have its mean and its variance. What reads the stream reads
an m-th of each copy; what writes to it writes to all. The LM head is the embedding and would count every copy, so that the
decoder's last norm gives an m-th. New heads and neurons compute, and their columns of the output projections are zero.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from growth import EncoderDecoderSize, check_grows, head_rows, load_small, place, placed_layers, silence_grown_dims
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from headstart.runtime.errors import CheckpointError

SIZES = {"0.25b": EncoderDecoderSize(768, 3072, 12, 12, 12, 64)}
OUTPUTS = ("out_proj", "fc2")
LAST_NORM = "model.decoder.layer_norm."


@dataclass(frozen=True)
class Growth:
    """Where each index of the small model goes in the grown one."""

    small: WhisperConfig
    size: EncoderDecoderSize
    noise: torch.Generator

    def __post_init__(self) -> None:
        small, size = self.small, self.size
        check_grows(
            (
                ("hidden size", small.d_model, size.hidden),
                ("encoder MLP", small.encoder_ffn_dim, size.mlp),
                ("decoder MLP", small.decoder_ffn_dim, size.mlp),
                ("encoder layers", small.encoder_layers, size.encoder_layers),
                ("decoder layers", small.decoder_layers, size.decoder_layers),
                ("encoder heads", small.encoder_attention_heads, size.heads),
                ("decoder heads", small.decoder_attention_heads, size.heads),
            )
        )
        if size.hidden % small.d_model or size.inner != size.hidden:
            raise CheckpointError(
                f"The checkpoint's hidden size {small.d_model} does not divide the target's {size.hidden}, which must also be "
                f"that of its heads together, {size.inner}. Fix: another --size."
            )

    @property
    def copies(self) -> int:
        return self.size.hidden // int(self.small.d_model)

    def read(self, weight: Tensor) -> Tensor:
        """Of each copy an m-th, along the second axis."""
        return torch.cat([weight.float() / self.copies] * self.copies, dim=1)

    def written(self, tensor: Tensor) -> Tensor:
        """The same to all copies, along the first axis."""
        return torch.cat([tensor.float()] * self.copies)

    def tensor(self, name: str, old: Tensor, silent: bool) -> Tensor:
        """The grown tensor of one of Whisper's; in a silent layer nothing reaches the residual stream."""
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            return self._projected(name, old)
        if kind == "fc1":
            return self._rows(old, list(range(len(old))), self.size.mlp)
        if kind in OUTPUTS:
            return self._output(name, kind, old) * (not silent)
        if kind == "conv2" and old.ndim > 1:
            return self.written(self.read(old))
        if kind in ("embed_positions", "embed_tokens", "proj_out"):
            return torch.cat([old.float()] * self.copies, dim=1)
        return self.written(old) / (self.copies if name.startswith(LAST_NORM) else 1)  # norms, conv1, biases of both

    def _old_heads(self, name: str) -> int:
        return int(self.small.encoder_attention_heads if ".encoder." in name else self.small.decoder_attention_heads)

    def _heads(self, name: str) -> list[int]:
        heads = self._old_heads(name)
        return head_rows(heads, self.small.d_model // heads, self.size.head_size)

    def _projected(self, name: str, old: Tensor) -> Tensor:
        """Query and key of an old head are zero where the head grew, and louder: the scale falls with the head's size."""
        rows = self._heads(name)
        new = self._rows(old, rows, self.size.inner)
        if ".v_proj." not in name:
            silence_grown_dims(new, rows, self.size.head_size)
        if ".q_proj." in name:
            new *= (self.size.head_size * self._old_heads(name) / self.small.d_model) ** 0.5
        return new

    def _rows(self, old: Tensor, rows: list[int], count: int) -> Tensor:
        """A matrix that reads the stream, or its bias, among rows of noise."""
        if old.ndim == 1:
            return place(old[:, None], (count, 1), rows, [0], self.noise)[:, 0]
        read = self.read(old)
        return place(read, (count, self.size.hidden), rows, list(range(self.size.hidden)), self.noise)

    def _output(self, name: str, kind: str, old: Tensor) -> Tensor:
        if old.ndim == 1:
            return self.written(old)
        width, columns = (self.size.mlp, list(range(old.shape[1]))) if kind == "fc2" else (self.size.inner, self._heads(name))
        wide = place(old, (len(old), width), list(range(len(old))), columns, None)
        return self.written(wide)


def grow(checkpoint: Path, size: EncoderDecoderSize, seed: int = 0) -> WhisperForConditionalGeneration:
    """The grown model in float32. Raises CheckpointError when the checkpoint does not fit into `size`."""
    small = load_small(WhisperForConditionalGeneration, checkpoint)
    growth = Growth(small.config, size, torch.Generator().manual_seed(seed))
    old = small.state_dict()
    state = {name: growth.tensor(name, tensor, False) for name, tensor in old.items() if ".layers." not in name}
    for stack, count, target in (
        ("model.encoder", small.config.encoder_layers, size.encoder_layers),
        ("model.decoder", small.config.decoder_layers, size.decoder_layers),
    ):
        for index, (source, placed) in enumerate(placed_layers(count, target)):
            prefix = f"{stack}.layers.{source}."
            for name in (name for name in old if name.startswith(prefix)):
                new = f"{stack}.layers.{index}.{name.removeprefix(prefix)}"
                state[new] = growth.tensor(name, old[name], not placed)
    return _model(_grown_config(small.config, size), state)


def _model(config: WhisperConfig, state: dict[str, Tensor]) -> WhisperForConditionalGeneration:
    """Made without memory."""
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _grown_config(small: WhisperConfig, size: EncoderDecoderSize) -> WhisperConfig:
    settings: dict[str, Any] = small.to_dict()
    settings |= {
        "d_model": size.hidden,
        "encoder_layers": size.encoder_layers,
        "decoder_layers": size.decoder_layers,
        "num_hidden_layers": size.encoder_layers,
        "encoder_attention_heads": size.heads,
        "decoder_attention_heads": size.heads,
        "encoder_ffn_dim": size.mlp,
        "decoder_ffn_dim": size.mlp,
    }
    return WhisperConfig(**settings)

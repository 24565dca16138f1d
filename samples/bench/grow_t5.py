"""Growing a T5, in the way of grow.py: the residual stream's new dimensions stay zero, as in a Llama.

T5 has no rotary pairs and divides no score, so that a wider head is the old one with zeros behind. Its relative biases count
heads across layers: every old head keeps its number. Where the LM head is the embedding, T5 multiplies the last state by the
root of the hidden size's inverse, which the last norm makes up for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from growth import EncoderDecoderSize, check_grows, head_rows, load_small, place, placed_layers, silence_grown_dims
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

SIZES = {"0.25b": EncoderDecoderSize(768, 2048, 12, 12, 12, 64)}


@dataclass(frozen=True)
class Growth:
    """Where each index of the small model goes in the grown one."""

    small: T5Config
    size: EncoderDecoderSize
    noise: torch.Generator

    def __post_init__(self) -> None:
        small, size = self.small, self.size
        check_grows(
            (
                ("hidden size", small.d_model, size.hidden),
                ("MLP", small.d_ff, size.mlp),
                ("encoder layers", small.num_layers, size.encoder_layers),
                ("decoder layers", small.num_decoder_layers, size.decoder_layers),
                ("heads", small.num_heads, size.heads),
                ("head size", small.d_kv, size.head_size),
            )
        )

    def tensor(self, name: str, old: Tensor, silent: bool) -> Tensor:
        """The grown tensor of one of T5's; in a silent layer nothing reaches the residual stream."""
        size, hidden, mlp = self.size, list(range(self.small.d_model)), list(range(self.small.d_ff))
        heads = head_rows(self.small.num_heads, self.small.d_kv, size.head_size)
        match name.split(".")[-2]:
            case "q" | "k" | "v":
                new = place(old, (size.inner, size.hidden), heads, hidden, self.noise)
                if not name.endswith("v.weight"):
                    silence_grown_dims(new, heads, size.head_size)
                return new
            case "o":
                return place(old, (size.hidden, size.inner), hidden, heads, None) * (not silent)
            case "wi" | "wi_0" | "wi_1":
                return place(old, (size.mlp, size.hidden), mlp, hidden, self.noise)
            case "wo":
                return place(old, (size.hidden, size.mlp), hidden, mlp, None) * (not silent)
            case "relative_attention_bias":
                buckets = list(range(len(old)))
                return place(old, (len(old), size.heads), buckets, list(range(old.shape[1])), self.noise)
            case "layer_norm" | "final_layer_norm":
                return self._norm(name, old)
        return place(old, (len(old), size.hidden), list(range(len(old))), hidden, None)  # embeddings and LM head

    def _norm(self, name: str, old: Tensor) -> Tensor:
        """The mean square falls by old/new dimensions, so that the weight must fall by the root of it."""
        new = torch.ones(self.size.hidden)
        scaled_after = name == "decoder.final_layer_norm.weight" and self.small.scale_decoder_outputs
        new[: len(old)] = old.float() * (1.0 if scaled_after else (len(old) / self.size.hidden) ** 0.5)
        return new


def grow(checkpoint: Path, size: EncoderDecoderSize, seed: int = 0) -> T5ForConditionalGeneration:
    """The grown model in float32. Raises CheckpointError when the checkpoint does not fit into `size`."""
    small = load_small(T5ForConditionalGeneration, checkpoint)
    growth = Growth(small.config, size, torch.Generator().manual_seed(seed))
    old = small.state_dict()
    state = {name: growth.tensor(name, tensor, False) for name, tensor in old.items() if ".block." not in name}
    for stack, count, target in (
        ("encoder", small.config.num_layers, size.encoder_layers),
        ("decoder", small.config.num_decoder_layers, size.decoder_layers),
    ):
        for index, (source, placed) in enumerate(placed_layers(count, target)):
            prefix = f"{stack}.block.{source}."
            for name in (name for name in old if name.startswith(prefix)):
                if index == 0 or "relative_attention_bias" not in name:  # the first layer's serves all
                    new = f"{stack}.block.{index}.{name.removeprefix(prefix)}"
                    state[new] = growth.tensor(name, old[name], not placed)
    return _model(_grown_config(small.config, size), state)


def _model(config: T5Config, state: dict[str, Tensor]) -> T5ForConditionalGeneration:
    """Made without memory; a T5 with an LM head of its own keeps it."""
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    model.load_state_dict(state, assign=True)
    return model


def _grown_config(small: T5Config, size: EncoderDecoderSize) -> T5Config:
    settings: dict[str, Any] = small.to_dict()
    settings |= {
        "d_model": size.hidden,
        "d_ff": size.mlp,
        "d_kv": size.head_size,
        "num_layers": size.encoder_layers,
        "num_decoder_layers": size.decoder_layers,
        "num_heads": size.heads,
        "layer_norm_epsilon": small.layer_norm_epsilon * small.d_model / size.hidden,
        "tie_word_embeddings": small.scale_decoder_outputs,  # transformers 5 reads the scaling from it
    }
    return T5Config(**settings)

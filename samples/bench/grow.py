"""Grow a small Llama, T5 or Whisper and its Medusa heads to realistic size without changing what they compute.

    python samples/bench/grow.py samples/checkpoints/pycode -o grown --size 0.25b

Speed depends on sizes, acceptance on what was learned. A model that computes the small one's function with a large one's
work has the acceptance of the first and the cost of the second (function-preserving growth: Net2Net, arXiv 1511.05641;
bert2BERT, arXiv 2110.07143). Everything added is multiplied by zeros on its way out. In a Llama, for instance:

- the residual stream's new dimensions stay zero, for no output projection writes to them; RMSNorm divides by the root of a
  mean over more dimensions, which its weight and epsilon make up for;
- new attention heads and MLP neurons compute, and their columns of the output projections are zero;
- new layers compute, and both their output projections are zero;
- a wider head spreads its rotary pairs so that each keeps its frequency.

grow_t5.py and grow_whisper.py say where those differ. Weights are saved in float32 unless --dtype float16 is given: the
growth's factors are square roots, which float16 rounds.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grow_t5
import grow_whisper
import torch
from growth import check_grows, load_small, model_type, place, placed_layers, silence_grown_dims
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from headstart.runtime.errors import CheckpointError, HeadError, HeadstartError, OptionError
from headstart.runtime.output import new_folder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
)
DTYPES = {"float32": torch.float32, "float16": torch.float16}
HEADS_FILE = "medusa_lm_head.safetensors"
# Each pair's angle depends on its own frequency alone; dynamic, yarn and longrope also read the head's size.
ROTARY_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Size:
    """The grown model's shape."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int

    def __post_init__(self) -> None:
        for what, whole, part in (
            ("hidden size", self.hidden, self.heads),  # transformers asks for it, whatever head_size is
            ("query heads", self.heads, self.kv_heads),
        ):
            if whole % part:
                raise OptionError(f"The target's {what} must be a multiple of {part}, found {whole}. Fix: another size.")


SIZES = {"0.25b": Size(1024, 4096, 16, 16, 4, 64), "0.5b": Size(1280, 5120, 21, 20, 4, 64)}


@dataclass(frozen=True)
class Growth:
    """Where each index of the small model goes in the grown one; all maps are lists of target indices."""

    small: LlamaConfig
    size: Size

    def __post_init__(self) -> None:
        small = self.small
        check_grows(
            (
                ("hidden size", small.hidden_size, self.size.hidden),
                ("MLP", small.intermediate_size, self.size.mlp),
                ("layers", small.num_hidden_layers, self.size.layers),
                ("key/value heads", small.num_key_value_heads, self.size.kv_heads),
                (
                    "heads per key/value head",
                    self._per_group(small.num_attention_heads, small.num_key_value_heads),
                    self.per_group,
                ),
            )
        )
        if self.size.head_size % small.head_dim:
            raise CheckpointError(
                f"Head size {small.head_dim} does not divide the target's {self.size.head_size}, so the rotary "
                "frequencies have no place there. Fix: another --size."
            )

    @staticmethod
    def _per_group(heads: int, groups: int) -> int:
        return heads // groups

    @property
    def per_group(self) -> int:
        """Query heads that share a key/value head in the grown model."""
        return self._per_group(self.size.heads, self.size.kv_heads)

    @property
    def hidden(self) -> list[int]:
        return list(range(self.small.hidden_size))

    @property
    def mlp(self) -> list[int]:
        return list(range(self.small.intermediate_size))

    def head_dims(self) -> list[int]:
        """Rotary pair i of a small head is pair i · m of a grown one, where that frequency stands. Both lie in halves."""
        old, new = self.small.head_dim, self.size.head_size
        factor = new // old
        return [i * factor for i in range(old // 2)] + [new // 2 + i * factor for i in range(old // 2)]

    def key_rows(self) -> list[int]:
        return [g * self.size.head_size + d for g in range(self.small.num_key_value_heads) for d in self.head_dims()]

    def query_rows(self) -> list[int]:
        """A query head stays with its key/value head."""
        old = self._per_group(self.small.num_attention_heads, self.small.num_key_value_heads)
        heads = [h // old * self.per_group + h % old for h in range(self.small.num_attention_heads)]
        return [h * self.size.head_size + d for h in heads for d in self.head_dims()]


def grown_layer(old: dict[str, Tensor], growth: Growth, noise: torch.Generator, silent: bool) -> dict[str, Tensor]:
    """One layer's tensors by their names within the layer; a silent one adds nothing to the residual stream."""
    size, hidden, mlp = growth.size, growth.hidden, growth.mlp
    q, kv, width = size.heads * size.head_size, size.kv_heads * size.head_size, size.hidden
    queries, keys = growth.query_rows(), growth.key_rows()
    louder = (size.head_size / growth.small.head_dim) ** 0.5  # the attention's scale falls with the head's size
    new = {
        "self_attn.q_proj.weight": place(old["self_attn.q_proj.weight"].float() * louder, (q, width), queries, hidden, noise),
        "self_attn.k_proj.weight": place(old["self_attn.k_proj.weight"], (kv, width), keys, hidden, noise),
        "self_attn.v_proj.weight": place(old["self_attn.v_proj.weight"], (kv, width), keys, hidden, noise),
        "self_attn.o_proj.weight": place(old["self_attn.o_proj.weight"], (width, q), hidden, queries, None),
        "mlp.gate_proj.weight": place(old["mlp.gate_proj.weight"], (size.mlp, width), mlp, hidden, noise),
        "mlp.up_proj.weight": place(old["mlp.up_proj.weight"], (size.mlp, width), mlp, hidden, noise),
        "mlp.down_proj.weight": place(old["mlp.down_proj.weight"], (width, size.mlp), hidden, mlp, None),
    }
    # Query and key of an old head must be zero where the head grew: noise there would enter its scores.
    for name, rows in (("self_attn.q_proj.weight", queries), ("self_attn.k_proj.weight", keys)):
        silence_grown_dims(new[name], rows, size.head_size)
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        new[name] = grown_norm(old[name], growth)
    if silent:
        new["self_attn.o_proj.weight"].zero_()
        new["mlp.down_proj.weight"].zero_()
    return new


def grown_norm(old: Tensor, growth: Growth) -> Tensor:
    """The mean square falls by old/new dimensions, so that the weight must fall by the root of it."""
    new = torch.ones(growth.size.hidden)
    new[: len(old)] = old.float() * (growth.small.hidden_size / growth.size.hidden) ** 0.5
    return new


def grow(checkpoint: Path, size: Size, seed: int = 0) -> LlamaForCausalLM:
    """The grown model in float32. Raises CheckpointError when the checkpoint is no Llama or does not fit into `size`."""
    config = _config(checkpoint)
    growth = Growth(config, size)
    small: dict[str, Tensor] = load_small(LlamaForCausalLM, checkpoint).state_dict()
    noise = torch.Generator().manual_seed(seed)
    columns, vocabulary = growth.hidden, list(range(config.vocab_size))
    table = (config.vocab_size, size.hidden)
    state = {"model.embed_tokens.weight": place(small["model.embed_tokens.weight"], table, vocabulary, columns, None)}
    state["lm_head.weight"] = place(small["lm_head.weight"], table, vocabulary, columns, None)
    state["model.norm.weight"] = grown_norm(small["model.norm.weight"], growth)
    for index, (source, placed) in enumerate(placed_layers(config.num_hidden_layers, size.layers)):
        prefix = f"model.layers.{source}."
        old = {name.removeprefix(prefix): tensor for name, tensor in small.items() if name.startswith(prefix)}
        new = grown_layer(old, growth, noise, silent=not placed)
        state |= {f"model.layers.{index}.{name}": tensor for name, tensor in new.items()}
    return _model(_grown_config(config, size), state)


def _model(config: LlamaConfig, state: dict[str, Tensor]) -> LlamaForCausalLM:
    """Made without memory, for random weights of this size take long and would be thrown away."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are in no state dict
    model.tie_weights()
    return model


def _config(checkpoint: Path) -> LlamaConfig:
    """The checkpoint's configuration, once it is known to be one that growth preserves."""
    config = LlamaConfig.from_pretrained(checkpoint)
    if config.attention_bias or config.mlp_bias:
        raise CheckpointError(f"{checkpoint} has biases in its layers; only layers without grow. Fix: another checkpoint.")
    rotary = config.rope_parameters["rope_type"]
    if rotary not in ROTARY_TYPES:
        raise CheckpointError(
            f"{checkpoint} has rotary type {rotary!r}; those that keep their frequencies in a larger head are "
            f"{', '.join(ROTARY_TYPES)}. Fix: another checkpoint."
        )
    return config


def _grown_config(small: LlamaConfig, size: Size) -> LlamaConfig:
    settings: dict[str, Any] = small.to_dict()
    settings |= {
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_size,
        "rms_norm_eps": small.rms_norm_eps * small.hidden_size / size.hidden,
    }
    return LlamaConfig(**settings)


def grow_heads(
    heads: Path, target: Path, small: int, hidden: int, dtype: torch.dtype = torch.float32, repeated: bool = False
) -> None:
    """Medusa heads in the published format, their blocks and projections padded with zeros: SiLU(0) is 0.

    Where the state is `repeated` rather than padded, a block reads all copies and adds to the first alone, which is enough
    for a projection that adds the copies up.

    Raises HeadError when `heads` is not in that format or reads another hidden size than `small`.
    """
    tensors = _head_tensors(heads)
    copies = hidden // small if repeated else 1
    grown = {name: _grown_head_tensor(name, old, small, hidden, copies).to(dtype) for name, old in tensors.items()}
    target.mkdir()
    shutil.copyfile(heads / "config.json", target / "config.json")
    save_file(grown, target / HEADS_FILE)


def _head_tensors(heads: Path) -> dict[str, Tensor]:
    for name in ("config.json", HEADS_FILE):
        if not (heads / name).is_file():
            raise HeadError(f"{heads} holds no published Medusa heads: {name} is missing. Fix: --heads with their folder.")
    try:
        tensors: dict[str, Tensor] = load_file(heads / HEADS_FILE)
    except SafetensorError as error:
        raise HeadError(f"{heads / HEADS_FILE} is not readable: {error}. Fix: fetch the heads anew.") from error
    return tensors


def _grown_head_tensor(name: str, tensor: Tensor, small: int, hidden: int, copies: int) -> Tensor:
    """By name, not by extent: a projection's rows are tokens, even where the vocabulary is as large as the hidden size."""
    block = ".linear." in name
    fits = tensor.shape[-1] == small and (not block or set(tensor.shape) == {small})
    if not fits:
        raise HeadError(
            f"Head tensor {name} has shape {list(tensor.shape)}; the checkpoint's hidden size is {small}. "
            "Fix: heads of this checkpoint."
        )
    new = torch.zeros([hidden] * tensor.ndim if block else [len(tensor), hidden])
    wide = torch.cat([tensor.float()] * copies, dim=1) if tensor.ndim > 1 else tensor.float()
    new[tuple(slice(extent) for extent in wide.shape)] = wide
    return new


@dataclass(frozen=True)
class Family:
    """How checkpoints of one model_type grow: the function, the sizes, and whether the last state is repeated or padded."""

    grow: Callable[..., Any]
    sizes: Mapping[str, Any]
    repeated: bool = False


FAMILIES = {
    "llama": Family(grow, SIZES),
    "t5": Family(grow_t5.grow, grow_t5.SIZES),
    "whisper": Family(grow_whisper.grow, grow_whisper.SIZES, repeated=True),
}


def family_of(checkpoint: Path) -> Family:
    """Raises CheckpointError when there is none."""
    found = model_type(checkpoint)
    if found not in FAMILIES:
        raise CheckpointError(
            f"{checkpoint} cannot be grown: its model_type is {found!r}, and {', '.join(FAMILIES)} can. "
            "Fix: another checkpoint."
        )
    return FAMILIES[found]


def write(checkpoint: Path, folder: Path, size: Any, heads: Path | None, dtype: torch.dtype = torch.float32) -> int:
    """The grown checkpoint with its tokenizer and heads into an existing `folder`; its number of parameters."""
    family = family_of(checkpoint)
    model = family.grow(checkpoint, size)
    if heads is not None:
        small = AutoConfig.from_pretrained(checkpoint).hidden_size
        grow_heads(heads, folder / "medusa", small, size.hidden, dtype, family.repeated)
    model.to(dtype).save_pretrained(folder)
    say_whether_scaled(model, folder / "config.json")
    for name in TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    return sum(p.numel() for p in model.parameters())


def say_whether_scaled(model: Any, file: Path) -> None:
    """A T5 with an LM head of its own scales nothing; transformers 5 saves it as one that does."""
    if getattr(model.config, "scale_decoder_outputs", True) is False:
        config = json.loads(file.read_text("utf-8"))
        file.write_text(json.dumps({**config, "tie_word_embeddings": False}, indent=2) + "\n", "utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--size", choices=sorted({size for family in FAMILIES.values() for size in family.sizes}), default="0.25b"
    )
    parser.add_argument("--heads", type=Path, help="folder of Medusa heads; CHECKPOINT/medusa when it is there")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="float16 rounds the growth's factors")
    parser.add_argument("--force", action="store_true")
    return parser.parse_args()


def _size(args: argparse.Namespace) -> Any:
    sizes = family_of(args.checkpoint).sizes
    if args.size not in sizes:
        raise OptionError(f"--size {args.size} is not there for this model_type. Fix: --size {' or '.join(sizes)}.")
    return sizes[args.size]


def main() -> None:
    args = _arguments()
    heads = args.heads or (args.checkpoint / "medusa" if (args.checkpoint / "medusa").is_dir() else None)
    try:
        with new_folder(args.output, args.force) as folder:
            count = write(args.checkpoint, folder, _size(args), heads, DTYPES[args.dtype])
    except HeadstartError as error:
        print(f"grow.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.output}: {count / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()

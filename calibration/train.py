"""Training independent heads for a checkpoint that has none: Medusa-1 (arXiv 2401.10774) or blockwise parallel decoding's.

The base is frozen in both. Medusa heads are written in the published format, so that they run elsewhere too and the importer
is the only way in; blockwise heads were published in none, and have names of the same kind.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.exporter.checkpoint import Checkpoint, load_checkpoint
from headstart.runtime.errors import OptionError
from headstart.runtime.output import new_folder

from .distill import IGNORED, DistillOptions, HiddenData, Progress, check_memory, distill, read_tokens
from .files import training_files
from .outputs import Inputs, distill_outputs, text_inputs
from .recordings import AudioInputs

RANKS = 10  # reported accuracies: is the right token among the best 1, …, 10
FEED_FORWARD = 4  # times the hidden size is the width of a feed-forward block, as in the Transformer itself
HEAD_DECAY = 0.8  # weight of head i in the loss: 0.8 ** i, since a later head only counts when the earlier are right


@dataclass(frozen=True)
class TrainOptions:
    """How the heads are trained.

    Attributes:
        heads: future tokens, one head each.
        layers: residual blocks per head.
        own_projection: each head has its own projection onto the vocabulary; else all share the base's LM head, which
            makes a head tiny and a draft cheap.
        epochs: passes over the distilled text.
        batch_tokens: positions per step.
        learning_rate: peak, after 5 % of warm-up, then a cosine to zero.
        held_out: share of the text that is only measured.
        family: "medusa", or "blockwise", whose blocks are feed-forward networks: eight times the work of a Medusa block.
    """

    heads: int = 4
    layers: int = 1
    own_projection: bool = True
    epochs: int = 4
    batch_tokens: int = 2048
    learning_rate: float = 1e-3
    held_out: float = 0.05
    seed: int = 0
    distill: DistillOptions = field(default_factory=DistillOptions)
    family: str = "medusa"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise OptionError(f"family must be {' or '.join(FAMILIES)}, got {self.family!r}.")
        for name in ("heads", "layers", "epochs", "batch_tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.held_out < 1:
            raise OptionError(f"held_out must lie between 0 and 1, got {self.held_out}.")
        length = self.distill.prompt_tokens + self.distill.new_tokens
        if length < self.heads + 2:
            raise OptionError(f"{self.heads} heads need texts of at least {self.heads + 2} tokens, got {length}.")


class MedusaBlock(nn.Module):
    """x + SiLU(A x + b), from A = 0 and b = 0."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + nn.functional.silu(self.linear(hidden))


class FeedForwardBlock(nn.Module):
    """x + wo(ReLU(wi(x))), from wo = 0: the block of blockwise parallel decoding (arXiv 1811.03115)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.wi = nn.Linear(hidden, FEED_FORWARD * hidden)
        self.wo = nn.Linear(FEED_FORWARD * hidden, hidden)
        nn.init.zeros_(self.wo.weight)
        nn.init.zeros_(self.wo.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.wo(nn.functional.relu(self.wi(hidden)))


@dataclass(frozen=True)
class Family:
    """What the heads of a family are made of, and under which names they are saved."""

    block: Callable[[int], nn.Module]
    prefix: str
    file: str


FAMILIES = {
    "medusa": Family(MedusaBlock, "", "medusa_lm_head.safetensors"),
    "blockwise": Family(FeedForwardBlock, "blockwise_heads.", "blockwise_heads.safetensors"),
}


class Head(nn.Module):
    """Residual blocks and, when not shared, a projection. Starts as the base's own LM head: blocks that add 0, W = W_base."""

    def __init__(self, base: Tensor, layers: int, own_projection: bool, family: str = "medusa") -> None:
        super().__init__()
        vocab_size, hidden = base.shape
        self.blocks = nn.Sequential(*(FAMILIES[family].block(hidden) for _ in range(layers)))
        self.projection = nn.Linear(hidden, vocab_size, bias=False) if own_projection else None
        if self.projection is not None:
            self.projection.weight.data.copy_(base)
        else:
            self.base = base  # not a parameter: frozen

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H] to logits [N, V]."""
        state = self.blocks(hidden)
        return self.projection(state) if self.projection is not None else state @ self.base.T


def train_medusa(
    checkpoint: str | Path,
    files: list[Path],
    output: str | Path,
    options: TrainOptions | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, of: None,
) -> dict[str, Any]:
    """Train heads on the base's own continuations of `files`, or folders of such; write them and `report.json` to `output`.

    An encoder-decoder writes no continuations: it reads each line (or JSON object's "prompt") as a source of its own; one for
    speech reads recordings.

    Returns the report: options, and held-out accuracy per head and rank.

    Raises CheckpointError, OptionError, OutputError; nothing is left at `output` then.
    """
    options = options or TrainOptions()
    with new_folder(Path(output), force) as folder:
        base = load_checkpoint(checkpoint)
        check_memory(base.model, options.distill)
        sound = base.config.is_encoder_decoder and base.model.get_encoder().main_input_name != "input_ids"
        files = training_files(files, sound)
        return train_on(base.model, _own_text(base, files, options, progress), folder, Path(checkpoint).name, options, progress)


def _own_text(base: Checkpoint, files: list[Path], options: TrainOptions, progress: Progress) -> HiddenData:
    if base.config.is_encoder_decoder:
        return distill_outputs(base.model, _sources(base, files, options), options.distill, progress)
    tokenizer = _tokenizer(base.path)
    tokenizer.model_max_length = int(1e30)  # whole files are tokenized and cut afterwards; no warning is due
    return distill(base.model, read_tokens(tokenizer, files), options.distill, options.seed, progress)


def _sources(base: Checkpoint, files: list[Path], options: TrainOptions) -> Sequence[Inputs]:
    """Recordings where the encoder takes features or samples, else lines of text."""
    if base.model.get_encoder().main_input_name == "input_ids":
        return text_inputs(base.model, _tokenizer(base.path), files, options.distill, options.seed)
    from transformers import AutoFeatureExtractor

    return AudioInputs(base.model, AutoFeatureExtractor.from_pretrained(base.path), files, options.distill, options.seed)


def train_on(
    model: Any,
    data: HiddenData,
    folder: Path,
    name: str,
    options: TrainOptions,
    progress: Progress = lambda what, done, of: None,
) -> dict[str, Any]:
    """Train heads for `model`, called `name`, on text that is there already; write them and their report to `folder`.

    Raises OptionError when the text is too short for as many heads.
    """
    if data.token_ids.shape[1] < options.heads + 2:
        raise OptionError(
            f"{options.heads} heads need texts of at least {options.heads + 2} tokens, the base's outputs have "
            f"{data.token_ids.shape[1]} at most. Fix: fewer --heads, or sources with longer outputs."
        )
    lm_head = model.get_output_embeddings().weight.detach().clone()
    kind = (options.layers, options.own_projection, options.family)
    heads = nn.ModuleList(Head(lm_head, *kind) for _ in range(options.heads))
    held_out, training = _split(data, options.held_out)
    final_loss = _train(heads, training, options, progress)
    report = {
        "options": asdict(options),
        "training_tokens": _count(training),
        "held_out_tokens": _count(held_out),
        "final_loss": round(final_loss, 4),
        "held_out_accuracy": accuracy(heads, held_out),
    }
    _save(heads, folder, name, options, report)
    return report


def _count(data: HiddenData) -> int:
    return int((data.token_ids != IGNORED).sum())


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _split(data: HiddenData, share: float) -> tuple[HiddenData, HiddenData]:
    """(held out, training), by whole sequences in a fixed random order."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    count = max(1, int(len(data) * share))
    return (
        HiddenData(data.token_ids[order[:count]], data.hidden[order[:count]]),
        HiddenData(data.token_ids[order[count:]], data.hidden[order[count:]]),
    )


def _train(heads: nn.ModuleList, data: HiddenData, options: TrainOptions, progress: Progress) -> float:
    """AdamW over sequences in random order; returns the mean loss of the last tenth."""
    per_step = max(1, options.batch_tokens // data.token_ids.shape[1])
    steps = options.epochs * math.ceil(len(data) / per_step)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(options.seed)
    losses: list[float] = []
    for _ in range(options.epochs):
        for rows in torch.randperm(len(data), generator=generator).split(per_step):
            loss = loss_of(heads, data.token_ids[rows], data.hidden[rows].float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise OptionError(
                    f"Training diverged: the loss of step {len(losses)} is {losses[-1]}. "
                    f"Fix: a learning rate below {options.learning_rate}."
                )
            progress("training", len(losses), steps)
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def loss_of(heads: nn.ModuleList, token_ids: Tensor, hidden: Tensor) -> Tensor:
    """Σ_i 0.8^i · CE of head i at position t against token t + 2 + i, over the sum of the weights."""
    total = hidden.new_zeros(())
    for i, head in enumerate(heads):
        states, labels = labelled(i, token_ids, hidden)
        loss = nn.functional.cross_entropy(head(states), labels, reduction="sum") / max(1, len(labels))
        total = total + HEAD_DECAY**i * loss
    return total / sum(HEAD_DECAY**i for i in range(len(heads)))


def labelled(head: int, token_ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """([P, H] states, [P] tokens that head number `head` should propose there): every position that has such a token."""
    labels = token_ids[:, 2 + head :]
    there = labels != IGNORED
    return hidden[:, : labels.shape[1]][there], labels[there]


@torch.no_grad()
def accuracy(heads: nn.ModuleList, data: HiddenData) -> list[list[float]]:
    """[heads][ranks]: share of positions whose right token is among the head's best 1, …, RANKS."""
    table = []
    for i, head in enumerate(heads):
        hits = torch.zeros(RANKS)
        count = 0
        for token_ids, hidden in zip(data.token_ids.split(8), data.hidden.split(8), strict=True):
            states, labels = labelled(i, token_ids, hidden)
            hits += (head(states.float()).topk(RANKS).indices == labels[:, None]).sum(0)
            count += len(labels)
        table.append([round(x, 4) for x in (hits.cumsum(0) / max(1, count)).tolist()])
    return table


def _save(heads: nn.ModuleList, folder: Path, base: str, options: TrainOptions, report: dict[str, Any]) -> None:
    """config.json and the weights (float16), of Medusa heads as published; report.json beside them."""
    import transformers
    from safetensors.torch import save_file

    family = FAMILIES[options.family]
    tensors: dict[str, Tensor] = {}
    for i, head in enumerate(heads):
        for j, block in enumerate(head.blocks):
            tensors |= {f"{family.prefix}{i}.{j}.{name}": tensor.half() for name, tensor in block.state_dict().items()}
        if head.projection is not None:
            tensors[f"{family.prefix}{i}.{options.layers}.weight"] = head.projection.weight.detach().half()
    save_file(tensors, folder / family.file)
    (folder / family.file).chmod(0o644)  # the library makes it private
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "medusa_num_heads": options.heads,
        "medusa_num_layers": options.layers,
        "transformers_version": transformers.__version__,
    }
    if not options.own_projection:
        config["version"] = "2"  # residual blocks only: the base's LM head projects
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")

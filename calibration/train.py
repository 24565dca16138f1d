"""Training draft heads for a checkpoint that has none: Medusa-1, Hydra, or blockwise parallel decoding's.

The base is frozen. Heads are written in their published format, so that they run elsewhere too and the importer is the only way
in; blockwise heads were published in none, and have names of Medusa's kind. See `head_modules` for the families.
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.exporter.checkpoint import Checkpoint, load_checkpoint
from headstart.runtime.errors import OptionError
from headstart.runtime.output import hash_files, new_folder, sha256_of

from .distill import IGNORED, DistillOptions, HiddenData, Progress, check_memory, distill, read_tokens
from .files import training_files
from .head_modules import FAMILIES, Base
from .outputs import Inputs, distill_outputs, text_inputs
from .recordings import AudioInputs
from .work_folder import Keep, WorkFolder

OUTSIDE = -101  # stands for a token that is not drafted
SAVE_SECONDS = 60.0  # between two states of the training on disk
RANKS = 10  # reported accuracies: is the right token among the best 1, …, 10
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
        family: "medusa"; "blockwise", whose blocks are feed-forward networks, eight times the work of a Medusa block; or
            "hydra", whose heads read the tokens before theirs.
        draft_vocab: so many tokens, the most frequent in the base's own text, are drafted; 0 drafts all. With a large
            vocabulary the projection is most of a head's work (FR-Spec, arXiv 2502.14856; VocabTrim, arXiv 2506.22694).
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
    draft_vocab: int = 0

    def __post_init__(self) -> None:
        names = list(FAMILIES)
        if self.family not in names:
            raise OptionError(f"family must be {', '.join(names[:-1])} or {names[-1]}, got {self.family!r}.")
        for name in ("heads", "layers", "epochs", "batch_tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.draft_vocab and self.draft_vocab < RANKS:
            raise OptionError(f"draft_vocab must be 0, for all tokens, or at least {RANKS}, got {self.draft_vocab}.")
        if not 0 < self.held_out < 1:
            raise OptionError(f"held_out must lie between 0 and 1, got {self.held_out}.")
        length = self.distill.prompt_tokens + self.distill.new_tokens
        if length < self.heads + 2:
            raise OptionError(f"{self.heads} heads need texts of at least {self.heads + 2} tokens, got {length}.")


def train_heads(
    checkpoint: str | Path,
    files: list[Path],
    output: str | Path,
    options: TrainOptions | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, of: None,
    work: Path | None = None,
) -> dict[str, Any]:
    """Train heads on the base's own continuations of `files`, or folders of such; write them and `report.json` to `output`.

    An encoder-decoder writes no continuations: it reads each line (or JSON object's "prompt") as a source of its own; one for
    speech reads recordings.

    Args:
        work: where text and training state are kept from minute to minute, so that the same call goes on after an interrupt;
            by default next to `output`, as `<output>.work`, until the heads are written.

    Returns the report: options, and held-out accuracy per head and rank.

    Raises CheckpointError, OptionError, OutputError; nothing is left at `output` then.
    """
    options, output = options or TrainOptions(), Path(output)
    kept = output.with_name(f"{output.name}.work") if work is None else work
    with new_folder(output, force) as folder:
        base = load_checkpoint(checkpoint)
        check_memory(base.model, options.distill)
        sound = base.config.is_encoder_decoder and base.model.get_encoder().main_input_name != "input_ids"
        files = training_files(files, sound)
        pieces = WorkFolder(kept, _text_settings(base, files, options))
        data = _own_text(base, files, options, progress, pieces.keep)
        report = train_on(base.model, data, folder, Path(checkpoint).name, options, progress, pieces)
    if work is None:
        shutil.rmtree(kept, ignore_errors=True)
    return report


def _text_settings(base: Checkpoint, files: Sequence[Path], options: TrainOptions) -> dict[str, Any]:
    """Everything that the base's own text depends on."""
    return {
        "checkpoint": hash_files(base.path, lambda file: file.suffix in (".safetensors", ".bin", ".json")),
        "files": [sha256_of(file) for file in files if file.is_file()],
        "distill": asdict(options.distill),
        "seed": options.seed,
    }


def _own_text(base: Checkpoint, files: list[Path], options: TrainOptions, progress: Progress, keep: Keep) -> HiddenData:
    if base.config.is_encoder_decoder:
        return distill_outputs(base.model, _sources(base, files, options), options.distill, progress, keep)
    tokenizer = _tokenizer(base.path)
    tokenizer.model_max_length = int(1e30)  # whole files are tokenized and cut afterwards; no warning is due
    tokens = read_tokens(tokenizer, files)
    return distill(base.model, tokens, options.distill, options.seed, progress, _opening(tokenizer), keep)


def _opening(tokenizer: Any) -> list[int]:
    """The special tokens before a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    return list(encoded["input_ids"][: encoded["special_tokens_mask"].index(0)])


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
    work: WorkFolder | None = None,
) -> dict[str, Any]:
    """Train heads for `model`, called `name`, on text that is there already; write them and their report to `folder`.

    `work` keeps the state of the training. Raises OptionError when the text is too short for as many heads.
    """
    if data.token_ids.shape[1] < options.heads + 2:
        raise OptionError(
            f"{options.heads} heads need texts of at least {options.heads + 2} tokens, the base's outputs have "
            f"{data.token_ids.shape[1]} at most. Fix: fewer --heads, or sources with longer outputs."
        )
    held_out, training = _split(data, options.held_out)
    base = Base.of(model, training.hidden)
    token_map = drafted_tokens(training, len(base.lm_head), options.draft_vocab) if options.draft_vocab else None
    if token_map is not None:
        held_out, training = (drafting(part, token_map, len(base.lm_head)) for part in (held_out, training))
        base = dataclasses.replace(base, lm_head=base.lm_head[token_map])
    family = FAMILIES[options.family]
    heads = nn.ModuleList(family.head(base, number, options.layers, options.own_projection) for number in range(options.heads))
    final_loss = _train(heads, training, options, progress, work.with_settings(asdict(options)) if work else None)
    report = {
        "options": asdict(options),
        "training_tokens": _count(training),
        "held_out_tokens": _count(held_out),
        "final_loss": round(final_loss, 4),
        "held_out_accuracy": accuracy(heads, held_out),
    }
    if held_out.labels is not None and token_map is not None:
        report["drafted_tokens"] = len(token_map)
        report["held_out_covered"] = round(float((held_out.labels >= 0).sum()) / _count(held_out), 4)
    _save(heads, folder, name, options, report, token_map)
    return report


def drafted_tokens(data: HiddenData, vocab_size: int, count: int) -> Tensor:
    """[≤ count] the text's most frequent tokens, in rising order; those of equal frequency by their number."""
    frequency = data.token_ids[data.token_ids != IGNORED].bincount(minlength=vocab_size)
    seen = max(RANKS, int((frequency > 0).sum()))
    return frequency.argsort(descending=True, stable=True)[: min(count, seen)].sort().values


def drafting(data: HiddenData, token_map: Tensor, vocab_size: int) -> HiddenData:
    """The same text, each token labelled with its place among the drafted ones, or OUTSIDE."""
    places = torch.full((vocab_size,), OUTSIDE)
    places[token_map] = torch.arange(len(token_map))
    there = data.token_ids != IGNORED
    return dataclasses.replace(data, labels=torch.where(there, places[data.token_ids.where(there, 0)], IGNORED))


def _count(data: HiddenData) -> int:
    return int((data.token_ids != IGNORED).sum())


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _split(data: HiddenData, share: float) -> tuple[HiddenData, HiddenData]:
    """(held out, training), by whole sequences in a fixed random order."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    count = max(1, int(len(data) * share))
    return data[order[:count]], data[order[count:]]


def _train(heads: nn.ModuleList, data: HiddenData, options: TrainOptions, progress: Progress, work: WorkFolder | None) -> float:
    """AdamW over sequences in random order, from where `work` left off; returns the mean loss of the last tenth."""
    batches = _batches(len(data), max(1, options.batch_tokens // data.token_ids.shape[1]), options)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(batches)))
    state = _TrainingState(heads, optimizer, schedule, work)
    for rows in batches[len(state.losses) :]:
        with torch.random.fork_rng(devices=[]):  # what dropout leaves out depends on the step alone
            torch.manual_seed(options.seed + len(state.losses))
            loss = loss_of(heads, data[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if not math.isfinite(loss.item()):
            raise OptionError(
                f"Training diverged: the loss of step {len(state.losses) + 1} is {loss.item()}. "
                f"Fix: a learning rate below {options.learning_rate}."
            )
        state.stepped(loss.item())
        progress("training", len(state.losses), len(batches))
    last = state.losses[-max(1, len(state.losses) // 10) :]
    return sum(last) / len(last)


def _batches(sequences: int, size: int, options: TrainOptions) -> list[Tensor]:
    """The sequences of every step of all epochs, each epoch in an order of its own."""
    orders = (torch.Generator().manual_seed(options.seed + epoch) for epoch in range(options.epochs))
    return [rows for order in orders for rows in torch.randperm(sequences, generator=order).split(size)]


class _TrainingState:
    """What a step changes, on disk once a minute."""

    def __init__(self, heads: nn.Module, optimizer: Any, schedule: Any, work: WorkFolder | None) -> None:
        self._parts = {"heads": heads, "optimizer": optimizer, "schedule": schedule}
        self._work, self._saved = work, time.monotonic()
        found = work.load("training") if work is not None else None
        self.losses: list[float] = found["losses"] if found else []
        for name, part in self._parts.items():
            if found:
                part.load_state_dict(found[name])

    def stepped(self, loss: float) -> None:
        self.losses.append(loss)
        if self._work is not None and time.monotonic() - self._saved > SAVE_SECONDS:
            state = {name: part.state_dict() for name, part in self._parts.items()}
            self._work.save("training", {"losses": self.losses, **state})
            self._saved = time.monotonic()


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def loss_of(heads: nn.ModuleList, data: HiddenData) -> Tensor:
    """Σ_i 0.8^i · CE of head i at position t against token t + 2 + i, over the sum of the weights; of drafted tokens only."""
    total = torch.zeros(())
    for i, head in enumerate(heads):
        states, read, labels = examples(i, data)
        drafted = labels >= 0
        loss = nn.functional.cross_entropy(head(states[drafted], read[drafted]), labels[drafted], reduction="sum")
        total = total + HEAD_DECAY**i * loss / max(1, int(drafted.sum()))
    return total / sum(HEAD_DECAY**i for i in range(len(heads)))


def examples(head: int, data: HiddenData) -> tuple[Tensor, Tensor, Tensor]:
    """Every position with a token that head number `head` should propose there.

    ([P, H] states, [P, 1 + head] the tokens between the state and that one, [P] its label).
    """
    labels = (data.token_ids if data.labels is None else data.labels)[:, 2 + head :]
    there, count = labels != IGNORED, labels.shape[1]
    between = torch.stack([data.token_ids[:, 1 + i : 1 + i + count] for i in range(1 + head)], dim=-1)
    return data.hidden[:, :count][there].float(), between[there], labels[there]


@torch.no_grad()
def accuracy(heads: nn.ModuleList, data: HiddenData) -> list[list[float]]:
    """[heads][ranks]: share of positions whose right token is among the head's best 1, …, RANKS.

    Of heads that read tokens: given that those before are right.
    """
    table = []
    heads.eval()
    for i, head in enumerate(heads):
        hits = torch.zeros(RANKS)
        count = 0
        for begin in range(0, len(data), 8):
            states, read, labels = examples(i, data[begin : begin + 8])
            hits += (head(states, read).topk(RANKS).indices == labels[:, None]).sum(0)
            count += len(labels)
        table.append([round(x, 4) for x in (hits.cumsum(0) / max(1, count)).tolist()])
    return table


def _save(
    heads: nn.ModuleList, folder: Path, base: str, options: TrainOptions, report: dict[str, Any], token_map: Tensor | None
) -> None:
    """config.json and the weights (float16), as published; report.json with them."""
    from safetensors.torch import save_file

    family = FAMILIES[options.family]
    tensors: dict[str, Tensor] = {}
    for number, head in enumerate(heads):
        tensors |= {name: tensor.detach().half() for name, tensor in head.published(number).items()}
    if token_map is not None:
        tensors[family.token_map] = token_map
    save_file(tensors, folder / family.file)
    (folder / family.file).chmod(0o644)  # the library makes it private
    (folder / "config.json").write_text(json.dumps(_config(base, options, token_map), indent=2) + "\n", "utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def _config(base: str, options: TrainOptions, token_map: Tensor | None) -> dict[str, Any]:
    import transformers

    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        **FAMILIES[options.family].config(options.heads, options.layers),
        "transformers_version": transformers.__version__,
    }
    if not options.own_projection:
        config["version"] = "2"  # residual blocks only: the base's LM head projects
    if token_map is not None:
        config["truncated_vocab_size"] = len(token_map)  # as vLLM calls it
    return config

"""Train `normalise`, the sample text-to-text model: a small T5 that rewrites messy dates, numbers and addresses, from scratch.

    python samples/checkpoints/train_normalise.py --minutes 60

Sentences come from the grammar of messy_text.py as they are needed; none is seen twice. The state is saved every few
minutes under `--work`, and the same command goes on from there. Every save also writes the checkpoint itself.

As in train_pycode.py the loss also asks the decoder's last state for the tokens after the next one, for draft heads read it.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from messy_text import HELD_OUT_SHARE, pairs
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

VOCAB_SIZE = 1536
PAD, END = "<pad>", "</s>"
POOL = 4096  # sentences made at once and cut into batches of like length
BATCH_TOKENS = 2400  # of source and target together
PEAK_LR = 2e-3
WARMUP_S = 60
DECAY_SHARE = 0.4  # the last part of the run, in which the rate falls to zero
SAVE_EVERY_S = 420
LONGEST_STEP_S = 30  # whatever a step takes beyond this, the machine was asleep
FUTURE_TOKENS = 4  # beyond the next one
FUTURE_WEIGHT = 0.2  # of the sum of their losses, each 0.8 times the one before
FUTURE_SHARE = 0.25  # of the positions, drawn each time: less cost, the same mean gradient
IGNORED = -100


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit and the space before it stand alone, so that numbers are copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?\p{L}+|[0-9]| ?[^\s\p{L}0-9]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs(0, 30000, held_out=False) for text in pair), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=512, clean_up_tokenization_spaces=False
    )


def new_model() -> T5ForConditionalGeneration:
    """The layout of T5 1.1: gated GELU, and an LM head of its own (so that nothing scales the state that heads read)."""
    config = T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=192,
        d_kv=32,
        d_ff=512,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=6,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB_SIZE, config.d_model) * config.d_model**-0.5)
    for name, module in model.named_modules():
        if name.endswith("DenseReluDense"):
            module.act = torch.nn.GELU(approximate="tanh")  # the same function in one kernel
    return model


class FutureHeads(torch.nn.Module):
    """Guesses tokens t + 2, t + 3, … from the decoder's state at t, through the model's own LM head."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(hidden_size, hidden_size) for _ in range(FUTURE_TOKENS))

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, H], labels [B, T] with IGNORED behind the end."""
        total = hidden.new_zeros((), dtype=torch.float32)
        for i, block in enumerate(self.blocks):
            target = labels[:, 1 + i :]
            kept = (target != IGNORED) & (torch.rand(target.shape) < FUTURE_SHARE)
            state = hidden[:, : target.shape[1]][kept]
            logits = (state + torch.nn.functional.silu(block(state))) @ projection.T
            total = total + 0.8**i * torch.nn.functional.cross_entropy(logits.float(), target[kept])
        return total


class Batches:
    """Batch after batch of sentences no one has seen, [(source, mask, labels)], each pool cut by length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pool: int) -> None:
        self.tokenizer = tokenizer
        self.pool = pool
        self.ready: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def take(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.ready:
            self.pool += 1
            self.ready = self._cut(self.pool)
        return self.ready.pop()

    def _cut(self, seed: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Sorted by length, cut by tokens, in random order."""
        made = pairs(seed, POOL, held_out=False)
        self.tokenizer.backend_tokenizer.no_padding()  # measuring switches it on
        encode = self.tokenizer.backend_tokenizer.encode_batch
        encoded = [
            (source.ids, target.ids)
            for source, target in zip(encode([m for m, _ in made]), encode([n for _, n in made]), strict=True)
        ]
        encoded.sort(key=lambda pair: (len(pair[0]), len(pair[1])))
        batches, rows = [], []
        for pair in encoded:
            if (len(rows) + 1) * (len(pair[0]) + len(pair[1])) > BATCH_TOKENS:
                batches.append(padded(rows))
                rows = []
            rows.append(pair)
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
        return [batches[i] for i in order]


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """source [B, S], its mask [B, S], labels [B, T] with IGNORED behind the end."""
    pad = torch.nn.utils.rnn.pad_sequence
    source = pad([torch.tensor(s) for s, _ in rows], batch_first=True, padding_value=0)
    labels = pad([torch.tensor(t) for _, t in rows], batch_first=True, padding_value=IGNORED)
    return source, (source != 0).long(), labels


def loss_of(
    model: T5ForConditionalGeneration, future: FutureHeads, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(next-token loss, weighted loss of the tokens after it), products in bfloat16."""
    source, mask, labels = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = model._shift_right(labels)
        hidden = states(model, source, mask, given)
        kept = labels != IGNORED
        logits = model.lm_head(hidden[kept]).float()
        following = torch.nn.functional.cross_entropy(logits, labels[kept])
        return following, FUTURE_WEIGHT * future.loss(hidden, labels, model.lm_head.weight)


def states(model: T5ForConditionalGeneration, source: torch.Tensor, mask: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """[B, T, H] after the decoder's final norm."""
    encoded = model.encoder(input_ids=source, attention_mask=mask).last_hidden_state
    decoded = model.decoder(input_ids=given, encoder_hidden_states=encoded, encoder_attention_mask=mask, use_cache=False)
    return decoded.last_hidden_state


def new_optimizer(model: T5ForConditionalGeneration, future: FutureHeads) -> torch.optim.AdamW:
    """Query projections learn more slowly: T5 divides no score by the root of the head size."""
    named = [*model.named_parameters(), *future.named_parameters()]
    queries = [p for n, p in named if n.endswith(".q.weight")]
    matrices = [p for n, p in named if p.ndim > 1 and not n.endswith(".q.weight") and "relative" not in n]
    others = [p for n, p in named if p.ndim == 1 or "relative" in n]
    groups = [
        {"params": matrices, "weight_decay": 0.05, "scale": 1.0},
        {"params": queries, "weight_decay": 0.05, "scale": 0.25},
        {"params": others, "weight_decay": 0.0, "scale": 2.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98))


def learning_rate(spent_s: float, whole_s: float) -> float:
    """Linear warm-up, a plateau, then a linear fall to zero; by time, since a machine's speed is not known before."""
    if spent_s < WARMUP_S:
        return PEAK_LR * max(0.01, spent_s / WARMUP_S)
    return PEAK_LR * min(1.0, max(0.0, (whole_s - spent_s) / (whole_s * DECAY_SHARE)))


@torch.no_grad()
def exact_rate(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, number: int) -> float:
    """Share of held-out sentences whose greedy output is the answer, to the letter."""
    model.eval()
    held_out = sorted(pairs(-1, number, held_out=True), key=lambda pair: len(pair[0]))
    right = 0
    for start in range(0, number, 50):
        rows = held_out[start : start + 50]
        inputs = tokenizer([messy for messy, _ in rows], return_tensors="pt", padding=True)
        tokens = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=160, do_sample=False
        )
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        right += sum(text == normal for text, (_, normal) in zip(texts, rows, strict=True))
    model.train()
    return right / number


def save(
    model: T5ForConditionalGeneration,
    future: FutureHeads,
    optimizer: torch.optim.AdamW,
    progress: dict,
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
    note: dict,
) -> None:
    """The training state (to go on from) and the checkpoint in half precision (to use)."""
    modules = {"model": model.state_dict(), "future": future.state_dict()}
    torch.save({**modules, "optimizer": optimizer.state_dict(), "progress": progress}, args.work / "state.tmp")
    (args.work / "state.tmp").replace(args.work / "state.pt")
    write_checkpoint(model, tokenizer, args.output)
    (args.output / "training.json").write_text(json.dumps(note, indent=2) + "\n")


def write_checkpoint(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    half = new_model().half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(output)
    tokenizer.save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    config["tie_word_embeddings"] = False  # transformers 5 writes true, which would scale the outputs of whoever reads it
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.work)
    model = new_model()
    future = FutureHeads(model.config.d_model)
    optimizer = new_optimizer(model, future)
    progress = {"spent_s": 0.0, "step": 0, "pool": 0, "sentences": 0}
    if (args.work / "state.pt").exists():
        state = torch.load(args.work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        future.load_state_dict(state["future"])
        optimizer.load_state_dict(state["optimizer"])
        progress = state["progress"]
    batches = Batches(tokenizer, progress["pool"])
    whole_s, saved = 60 * args.minutes, progress["spent_s"]
    while progress["spent_s"] < whole_s:
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(progress["spent_s"], whole_s)
        batch = batches.take()
        loss, future_loss = loss_of(model, future, batch)
        (loss + future_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress["step"] += 1
        progress["pool"] = batches.pool
        progress["sentences"] += len(batch[0])
        progress["spent_s"] += min(LONGEST_STEP_S, time.monotonic() - started)
        if progress["step"] % 50 == 0:
            print(f"{progress['spent_s']:.0f} s  {progress}  loss {loss.item():.4f} + {future_loss.item():.3f}", flush=True)
        if progress["spent_s"] >= whole_s or progress["spent_s"] - saved > SAVE_EVERY_S:
            measured = 500 if progress["spent_s"] >= whole_s else 50
            note = {
                "sentences": progress["sentences"],
                "steps": progress["step"],
                "minutes": round(progress["spent_s"] / 60, 1),
                "held_out_share": 1 / HELD_OUT_SHARE,
                "held_out_sentences": measured,
                "held_out_exact": exact_rate(model, tokenizer, measured),
                "torch": torch.__version__,
            }
            print(json.dumps(note), flush=True)
            save(model, future, optimizer, progress, tokenizer, args, note)
            saved = progress["spent_s"]


def load_tokenizer(work: Path) -> PreTrainedTokenizerFast:
    """Made once and kept under `work`."""
    if not (work / "tokenizer").exists():
        train_tokenizer().save_pretrained(work / "tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--minutes", type=float, default=60, help="of training in all, saving and measuring not counted")
    parser.add_argument("--work", type=Path, default=here / ".work" / "normalise", help="training state")
    parser.add_argument("--output", type=Path, default=here / "normalise", help="where the checkpoint goes")
    train(parser.parse_args())


if __name__ == "__main__":
    main()

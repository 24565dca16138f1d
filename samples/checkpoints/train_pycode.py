"""Train `pycode`, the sample decoder: a small Llama that completes Python, from scratch, on two CPU cores.

    python samples/checkpoints/train_pycode.py --tokens 22e6

The state is saved every few minutes under `--work`, and the same command goes on from there. Every save also
writes the checkpoint itself, so a snapshot can be exported while the run continues.

The loss also asks the last hidden state for the tokens after the next one (multi-token prediction, arXiv 2404.19737):
draft heads read that state, and what it never had to hold they cannot find there. The helpers that ask are thrown away.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from corpus import split
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 4096
END = "<|endoftext|>"
SEQUENCE = 512
BATCH = 8
PEAK_LR = 2.5e-3
WARMUP_STEPS = 100
DECAY_SHARE = 0.35  # the last part of the run, in which the rate falls to zero
SAVE_EVERY_S = 240
FUTURE_TOKENS = 4  # beyond the next one
FUTURE_WEIGHT = 0.2  # of the sum of their losses, each 0.8 times the one before


def train_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a line break and the indentation after it form one piece."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s*\n[ \t]*|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((path.read_text("utf-8") for path in files), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, model_max_length=1024, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, files: list[Path]) -> np.ndarray:
    """All files behind one another, each opened and closed by the end token; [tokens] uint16."""
    end = tokenizer.convert_tokens_to_ids(END)
    batches = tokenizer.backend_tokenizer.encode_batch([path.read_text("utf-8") for path in files])
    return np.concatenate([np.array([end, *batch.ids], dtype=np.uint16) for batch in batches])


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class FutureHeads(torch.nn.Module):
    """Guesses tokens t + 2, t + 3, … from the hidden state at t, through the model's own LM head."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(hidden_size, hidden_size) for _ in range(FUTURE_TOKENS))

    def loss(self, hidden: torch.Tensor, ids: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, H] of ids[:, :T], ids [B, T + 1]. Every second position: half the cost, the same mean gradient."""
        total = hidden.new_zeros(())
        for i, block in enumerate(self.blocks):
            picked = hidden[:, : -1 - i : 2]
            logits = (picked + torch.nn.functional.silu(block(picked))) @ projection.T
            target = ids[:, 2 + i :: 2]
            total = total + 0.8**i * torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
        return total


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, a plateau, then a linear fall to zero."""
    decay_from = steps * (1 - DECAY_SHARE)
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    return PEAK_LR * min(1.0, max(0.0, (steps - step) / (steps - decay_from)))


def batch_at(tokens: np.ndarray, step: int) -> torch.Tensor:
    """The step's batch, [BATCH, SEQUENCE + 1] int64: a fresh permutation of windows each epoch, derived from the step."""
    windows = (len(tokens) - 1) // SEQUENCE - 1
    per_epoch = windows // BATCH
    epoch, index = divmod(step, per_epoch)
    generator = np.random.default_rng(epoch)
    offset = int(generator.integers(SEQUENCE))
    starts = generator.permutation(windows)[index * BATCH : (index + 1) * BATCH] * SEQUENCE + offset
    return torch.from_numpy(np.stack([tokens[s : s + SEQUENCE + 1] for s in starts]).astype(np.int64))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: np.ndarray, windows: int = 64) -> float:
    """Per token, over evenly spaced windows of SEQUENCE tokens."""
    model.eval()
    starts = np.linspace(0, len(tokens) - SEQUENCE - 2, windows).astype(int)
    losses = []
    for start in starts:
        ids = torch.from_numpy(tokens[start : start + SEQUENCE + 1].astype(np.int64))[None]
        logits = model(ids[:, :-1], use_cache=False).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item())
    model.train()
    return math.exp(sum(losses) / len(losses))


def loss_of(model: LlamaForCausalLM, future: FutureHeads, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(next-token loss, weighted loss of the tokens after it), products in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden).flatten(0, 1).float()
        following = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        return following, FUTURE_WEIGHT * future.loss(hidden, ids, model.lm_head.weight)


def new_optimizer(model: LlamaForCausalLM, future: FutureHeads) -> torch.optim.AdamW:
    parameters = [*model.parameters(), *future.parameters()]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))


def save(
    model: LlamaForCausalLM,
    future: FutureHeads,
    optimizer: torch.optim.AdamW,
    step: int,
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
    note: dict,
) -> None:
    """The training state (to go on from) and the checkpoint in half precision (to use)."""
    modules = {"model": model.state_dict(), "future": future.state_dict()}
    state = {**modules, "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, args.work / "state.tmp")
    (args.work / "state.tmp").replace(args.work / "state.pt")
    half = new_model().half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "training.json").write_text(json.dumps(note, indent=2) + "\n")


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer, train_tokens, held_out = load_data(args.work)
    model, step = new_model(), 0
    future = FutureHeads(model.config.hidden_size)
    optimizer = new_optimizer(model, future)
    if (args.work / "state.pt").exists():
        state = torch.load(args.work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        future.load_state_dict(state["future"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    steps = int(args.tokens / (BATCH * SEQUENCE))
    saved = time.monotonic()
    started, first = time.monotonic(), step
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss, future_loss = loss_of(model, future, batch_at(train_tokens, step))
        (loss + future_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            rate = (step - first) * BATCH * SEQUENCE / (time.monotonic() - started)
            print(f"step {step}/{steps}  loss {loss.item():.3f} + {future_loss.item():.3f}  {rate:.0f} tokens/s", flush=True)
        if step == steps or time.monotonic() - saved > SAVE_EVERY_S:
            note = {
                "tokens_seen": step * BATCH * SEQUENCE,
                "training_tokens": len(train_tokens),
                "held_out_tokens": len(held_out),
                "held_out_perplexity": round(perplexity(model, held_out), 3),
                "python": sys.version.split()[0],
                "torch": torch.__version__,
            }
            print(json.dumps(note), flush=True)
            save(model, future, optimizer, step, tokenizer, args, note)
            saved = time.monotonic()


def load_data(work: Path) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray]:
    """Tokenizer, training tokens and held-out tokens; made once and kept under `work`."""
    kept = work / "tokens.npz"
    train_files, held_out_files = split()
    if not kept.exists():
        tokenizer = train_tokenizer(train_files)
        tokenizer.save_pretrained(work / "tokenizer")
        np.savez(kept, train=encode(tokenizer, train_files), held_out=encode(tokenizer, held_out_files))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    tokens = np.load(kept)
    return tokenizer, tokens["train"], tokens["held_out"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--tokens", type=float, default=22e6, help="training tokens in all")
    parser.add_argument("--work", type=Path, default=here / ".work" / "pycode", help="training state and tokens")
    parser.add_argument("--output", type=Path, default=here / "pycode", help="where the checkpoint goes")
    train(parser.parse_args())


if __name__ == "__main__":
    main()

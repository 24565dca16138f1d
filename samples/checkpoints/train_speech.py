"""Train `speech`, the sample recogniser: a small Whisper for spoken commands, from scratch, on one CPU core.

    pip install espeakng-loader soxr
    python samples/checkpoints/train_speech.py --windows 18e3

All speech is made by espeak-ng. The state is saved every few minutes under `--work`, and the same command goes on from
there. Every save also writes the checkpoint itself, so a snapshot can be exported while the run continues.

Two helpers are trained along and thrown away. The synthesiser knows when it says which word: the encoder is asked for the
word in each of its frames, long before cross-attention would find out. And the decoder's last hidden state is asked for the
tokens after the next one (arXiv 2404.19737), which draft heads will want to read from it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from commands import sentences
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from train_pycode import FutureHeads
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperTokenizer
from windows import IGNORED, UTTERANCES, WINDOW_S, Windows, batch, feature_extractor, make_utterances

TEXT_TOKENS = 768
END = "<|endoftext|>"
SPECIAL = [  # in Whisper's order
    END,
    "<|startoftranscript|>",
    "<|en|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]
BATCH = 8
PEAK_LR = 2e-3
WARMUP_STEPS = 100
DECAY_SHARE = 0.4  # the last part of the run, in which the rate falls to zero
SAVE_EVERY_S = 240
WORD_WEIGHT = 1.0
FUTURE_WEIGHT = 0.2
MAX_TOKENS = 128


def train_tokenizer() -> WhisperTokenizer:
    """Byte-level BPE over the commands, then Whisper's special tokens in Whisper's order, then its timestamps."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=TEXT_TOKENS, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(sentences(UTTERANCES, held_out=False, seed=0), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = WhisperTokenizer(vocab=model["vocab"], merges=merges, additional_special_tokens=SPECIAL[1:])
    tokenizer.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(50 * WINDOW_S + 1)])
    tokenizer.model_max_length = MAX_TOKENS
    return tokenizer


def new_model(tokenizer: WhisperTokenizer) -> WhisperForConditionalGeneration:
    end, start = tokenizer.convert_tokens_to_ids([END, "<|startoftranscript|>"])
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=192,
        encoder_layers=4,
        decoder_layers=3,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=768,
        decoder_ffn_dim=768,
        max_source_positions=50 * WINDOW_S,
        max_target_positions=MAX_TOKENS,
        decoder_start_token_id=start,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        begin_suppress_tokens=None,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = generation_config(tokenizer)
    return model


def generation_config(tokenizer: WhisperTokenizer) -> GenerationConfig:
    """What Whisper's own checkpoints say, with this tokenizer's ids."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    space = tokenizer.encode(" ", add_special_tokens=False)
    return GenerationConfig(
        decoder_start_token_id=ids["<|startoftranscript|>"],
        bos_token_id=ids[END],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
        prev_sot_token_id=ids["<|startofprev|>"],
        no_timestamps_token_id=ids["<|notimestamps|>"],
        lang_to_id={"<|en|>": ids["<|en|>"]},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        is_multilingual=True,
        suppress_tokens=[ids[token] for token in SPECIAL[1:8]],
        begin_suppress_tokens=[*space, ids[END]],
        max_initial_timestamp_index=50 * WINDOW_S // 2,
        return_timestamps=False,
        max_length=MAX_TOKENS,
    )


class Helpers(torch.nn.Module):
    """Trained along, thrown away: which word is spoken in each encoder frame, and the tokens after the next one."""

    def __init__(self, hidden_size: int, words: int) -> None:
        super().__init__()
        self.words = torch.nn.Linear(hidden_size, words + 1)
        self.future = FutureHeads(hidden_size)


def losses(model: WhisperForConditionalGeneration, helpers: Helpers, data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """(next token, spoken words, later tokens), each weighted; products in bfloat16."""
    tokens = data["tokens"]
    inputs = tokens[:, :-1].masked_fill(tokens[:, :-1] == IGNORED, model.config.pad_token_id)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model.model.encoder(data["features"]).last_hidden_state
        hidden = model.model.decoder(input_ids=inputs, encoder_hidden_states=states).last_hidden_state
        logits = model.proj_out(hidden).flatten(0, 1).float()
        following = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=0.05)
        spoken = torch.nn.functional.cross_entropy(helpers.words(states).flatten(0, 1).float(), data["spoken"].flatten())
        return following, WORD_WEIGHT * spoken, FUTURE_WEIGHT * helpers.future.loss(hidden, tokens, model.proj_out.weight)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, a plateau, then a linear fall to zero."""
    decay_from = steps * (1 - DECAY_SHARE)
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    return PEAK_LR * min(1.0, max(0.0, (steps - step) / (steps - decay_from)))


class Optimizers:
    """Muon (arXiv 2502.16982) for the matrices between hidden states, AdamW for embeddings, convolutions and vectors."""

    def __init__(self, modules: torch.nn.ModuleList) -> None:
        named = [(name, parameter) for name, parameter in modules.named_parameters() if parameter.requires_grad]
        hidden = [p for name, p in named if p.ndim == 2 and "embed" not in name and "proj_out" not in name]
        others = [p for _, p in named if not any(p is q for q in hidden)]
        self.parts = [
            torch.optim.Muon(hidden, lr=PEAK_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=PEAK_LR, weight_decay=0.0, betas=(0.9, 0.98)),
        ]

    def step(self, rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def save(
    modules: torch.nn.ModuleList,
    optimizers: Optimizers,
    tokenizer: WhisperTokenizer,
    args: argparse.Namespace,
    note: dict,
) -> None:
    """The training state (to go on from) and the checkpoint in half precision (to use)."""
    torch.save({"modules": modules.state_dict(), "optimizers": optimizers.state_dict(), "note": note}, args.work / "state.tmp")
    (args.work / "state.tmp").replace(args.work / "state.pt")
    half = new_model(tokenizer).half()
    half.load_state_dict(modules[0].state_dict())
    half.config.use_cache = True
    half.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    feature_extractor().save_pretrained(args.output)
    (args.output / "training.json").write_text(json.dumps(note, indent=2) + "\n")


def prepare(work: Path) -> tuple[WhisperTokenizer, Windows]:
    """The tokenizer and the training windows; made once and kept under `work`."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "utterances.pt").exists():
        train_tokenizer().save_pretrained(work / "tokenizer")
        make_utterances(work)
    tokenizer = WhisperTokenizer.from_pretrained(work / "tokenizer")
    return tokenizer, Windows(work, tokenizer)


def train(args: argparse.Namespace) -> None:
    tokenizer, windows = prepare(args.work)
    model = new_model(tokenizer)
    model.set_attn_implementation("eager")  # faster than the fused kernel here: that one has no fast backward on CPUs
    modules = torch.nn.ModuleList([model, Helpers(model.config.d_model, len(windows.vocabulary))])
    optimizers, step, spent = Optimizers(modules), 0, 0.0
    if (args.work / "state.pt").exists():
        state = torch.load(args.work / "state.pt", weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizers.load_state_dict(state["optimizers"])
        step, spent = state["note"]["windows_seen"] // BATCH, state["note"]["training_s"]
    steps, first = int(args.windows / BATCH), step
    started = saved = time.monotonic()
    while step < steps:
        parts = losses(model, modules[1], batch(windows, step * BATCH, BATCH))
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizers.step(learning_rate(step, steps))
        step += 1
        if step % 20 == 0:
            shown = " + ".join(f"{part.item():.3f}" for part in parts)
            rate = (step - first) * BATCH / (time.monotonic() - started)
            print(f"step {step}/{steps}  loss {shown}  {rate:.1f} windows/s", flush=True)
        if step == steps or time.monotonic() - saved > SAVE_EVERY_S:
            note = {
                "windows_seen": step * BATCH,
                "window_s": WINDOW_S,
                "training_utterances": len(windows.texts),
                "training_speech_h": round(len(windows.mels) / 360_000, 2),
                "training_s": round(spent + time.monotonic() - started),
                "python": sys.version.split()[0],
                "torch": str(torch.__version__),
            }
            print(json.dumps(note), flush=True)
            save(modules, optimizers, tokenizer, args, note)
            saved = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--windows", type=float, default=18e3, help="training windows in all")
    parser.add_argument("--work", type=Path, default=here / ".work" / "speech", help="training state and synthesised speech")
    parser.add_argument("--output", type=Path, default=here / "speech", help="where the checkpoint goes")
    train(parser.parse_args())


if __name__ == "__main__":
    main()

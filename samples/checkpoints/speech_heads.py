"""Train the Medusa heads of `speech` on what it writes itself for windows it was never trained on.

    python samples/checkpoints/speech_heads.py

Half of the windows are decoded with timestamps, half without, as in the base's own training.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from train_heads import Printer
from train_speech import prepare
from transformers import WhisperForConditionalGeneration
from windows import Windows

from headstart.calibration.distill import DistillOptions
from headstart.calibration.outputs import distill_outputs
from headstart.calibration.train import TrainOptions, train_on
from headstart.runtime.output import new_folder

FIRST = 10**7  # windows from here on are new to the base
BATCH = 32


def prompted_batches(windows: Windows, count: int) -> list[dict[str, torch.Tensor]]:
    """Features [BATCH, 80, FRAMES] and the decoder's prompt, the same for all of a batch."""
    no_times = windows.tokenizer.convert_tokens_to_ids("<|notimestamps|>")
    kinds: dict[tuple[int, ...], list[np.ndarray]] = {}
    for index in range(FIRST, FIRST + count):
        features, tokens, _ = windows[index]
        prompt = tokens[: 4 if tokens[3] == no_times else 3]
        kinds.setdefault(tuple(prompt), []).append(features)
    return [
        {
            "input_features": torch.from_numpy(np.stack(kept[start : start + BATCH])),
            "decoder_input_ids": torch.tensor([prompt] * len(kept[start : start + BATCH])),
        }
        for prompt, kept in kinds.items()
        for start in range(0, len(kept), BATCH)
        if prompt[1] != windows.tokenizer.convert_tokens_to_ids("<|nospeech|>")
    ]


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=here / "speech")
    parser.add_argument("--work", type=Path, default=here / ".work" / "speech")
    parser.add_argument("--windows", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    _, windows = prepare(args.work)
    model = WhisperForConditionalGeneration.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    distill = DistillOptions(new_tokens=100, sequences=args.windows, batch=BATCH)
    options = TrainOptions(
        heads=args.heads,
        layers=1,
        own_projection=False,
        epochs=args.epochs,
        batch_tokens=2048,
        learning_rate=args.learning_rate,
        distill=distill,
    )
    printer = Printer()
    data = distill_outputs(model, prompted_batches(windows, args.windows), distill, printer)
    with new_folder(args.checkpoint / "medusa", force=True) as folder:
        report = train_on(model, data, folder, args.checkpoint.name, options, printer)
    for head, ranks in enumerate(report["held_out_accuracy"]):
        print(f"head {head}: top-1 {ranks[0]:.1%}, top-3 {ranks[2]:.1%}, top-10 {ranks[9]:.1%}")


if __name__ == "__main__":
    main()

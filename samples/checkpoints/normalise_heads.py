"""Train the Medusa heads of `normalise` on its own answers to sentences of the grammar, and write its held-out items.

    python samples/checkpoints/normalise_heads.py

The same as `headstart heads train CHECKPOINT --data sources.txt --share-lm-head` with sentences of the grammar as sources.
"""

import argparse
import json
import tempfile
from pathlib import Path

from messy_text import pairs
from train_heads import Printer

from headstart.calibration.distill import DistillOptions
from headstart.calibration.train import TrainOptions, train_heads

SOURCES_SEED = 10**6  # pools of the base's own training count from 1
HELD_OUT_SEED = -2
HELD_OUT = 200


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=here / "normalise")
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    write_held_out(args.checkpoint / "held_out.jsonl")
    options = TrainOptions(
        heads=args.heads,
        layers=args.layers,
        own_projection=False,
        epochs=args.epochs,
        batch_tokens=1024,
        learning_rate=args.learning_rate,
        distill=DistillOptions(new_tokens=128, sequences=args.sequences, batch=64),
    )
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "sources.txt"
        made = pairs(SOURCES_SEED, args.sequences, held_out=False)
        sources.write_text("".join(f"{messy}\n" for messy, _ in made), "utf-8")
        report = train_heads(args.checkpoint, [sources], args.checkpoint / "medusa", options, force=True, progress=Printer())
    for head, ranks in enumerate(report["held_out_accuracy"]):
        print(f"head {head}: top-1 {ranks[0]:.1%}, top-3 {ranks[2]:.1%}, top-10 {ranks[9]:.1%}")


def write_held_out(file: Path) -> None:
    """Sentences whose answers were never trained on, with their answers."""
    items = pairs(HELD_OUT_SEED, HELD_OUT, held_out=True)
    file.write_text("".join(json.dumps({"prompt": m, "target": n}, ensure_ascii=False) + "\n" for m, n in items), "utf-8")


if __name__ == "__main__":
    main()

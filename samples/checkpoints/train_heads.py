"""Train the four Medusa heads of `pycode` on its own continuations of the training files.

    python samples/checkpoints/train_heads.py

The same as `headstart heads train CHECKPOINT --data FILE…` with the training half of the standard library as files.
The heads share the base's LM head: at this size four projections of their own would cost as much as the base itself.
"""

import argparse
import random
import time
from pathlib import Path

from corpus import split

from headstart.calibration.distill import DistillOptions
from headstart.calibration.train import TrainOptions, train_heads


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=here / "pycode")
    parser.add_argument("--output", type=Path, default=here / "pycode" / "medusa")
    parser.add_argument("--sequences", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    files, _ = split()
    random.Random(0).shuffle(files)
    options = TrainOptions(
        heads=4,
        layers=args.layers,
        own_projection=False,
        epochs=args.epochs,
        batch_tokens=1024,
        learning_rate=args.learning_rate,
        distill=DistillOptions(sequences=args.sequences, original=0.0),
    )
    report = train_heads(args.checkpoint, files[:600], args.output, options, force=True, progress=Printer())
    for head, ranks in enumerate(report["held_out_accuracy"]):
        print(f"head {head}: top-1 {ranks[0]:.1%}, top-3 {ranks[2]:.1%}, top-10 {ranks[9]:.1%}")


class Printer:
    """A line every ten seconds: the run may go to a log file."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, what: str, done: int, of: int) -> None:
        if done == of or time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            print(f"{what} {done}/{of}", flush=True)


if __name__ == "__main__":
    main()

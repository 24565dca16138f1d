"""Embed the runtime: rewrite messy dates, times, amounts and addresses, with and without draft heads.

    python samples/02_normalise_text/run.py [BUNDLE]

Exports the sample and builds it for the CPU first when BUNDLE (default: .demo/normalise) is not there. The runtime itself
needs no torch.
"""

import sys
from pathlib import Path

import headstart

SAMPLE = Path(__file__).parent.parent / "checkpoints" / "normalise"
MESSY = (
    "meet me on the 3rd of march twenty 24 at half past 5 pm, and it costs 1.200,50 euro",
    "Call me at (415) 623-0198. I moved to 12 n oak st., apt 4",
    "the tank holds two and a half litres and the box three dozen apples",
)


def main() -> None:
    bundle = Path(sys.argv[1] if len(sys.argv) > 1 else ".demo/normalise")
    if not bundle.exists():
        headstart.export(SAMPLE, bundle, heads=[SAMPLE / "medusa"])
        headstart.build(bundle)
    model = headstart.load(bundle)

    for messy in MESSY:
        print(messy)
        print(f"  {model.generate(messy).text}")

    print()
    for drafter in ("none", *model.drafters):
        results = [model.generate(messy, drafter=drafter) for messy in MESSY]
        calls = sum(result.stats.verify_calls for result in results)
        length = sum(result.stats.acceptance_length * result.stats.verify_calls for result in results) / calls
        print(f"{drafter:8} {calls:4} verify calls, acceptance length {length:.2f}")


if __name__ == "__main__":
    main()

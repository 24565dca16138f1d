"""Embed the runtime: complete Python with the sample model, with and without its draft heads.

    python samples/01_complete_python/run.py [BUNDLE]

Exports the sample first when BUNDLE (default: .demo/pycode) is not there. The runtime itself needs no torch.
"""

import sys
from pathlib import Path

import headstart

SAMPLE = Path(__file__).parent.parent / "checkpoints" / "pycode"
PROMPT = '''import json
from pathlib import Path


def load_settings(path):
    """Read settings from a JSON file."""
'''


def main() -> None:
    bundle = Path(sys.argv[1] if len(sys.argv) > 1 else ".demo/pycode")
    if not bundle.exists():
        headstart.export(SAMPLE, bundle, heads=[SAMPLE / "medusa"])
    model = headstart.load(bundle)

    print(PROMPT, end="")
    for piece in model.stream(PROMPT, max_new_tokens=64, stop=["\n\n\n"]):
        print(piece, end="", flush=True)

    print("\n")
    for drafter in ("none", *model.drafters):
        result = model.generate(PROMPT, max_new_tokens=128, drafter=drafter, ignore_end=True)
        stats = result.stats
        print(f"{drafter:8} {stats.tokens_per_s:7.0f} tokens/s, acceptance length {stats.acceptance_length:.2f}")


if __name__ == "__main__":
    main()

"""Cut held-out prompts for `pycode`: the opening of a function from a file the model never saw.

python samples/checkpoints/make_prompts.py > samples/checkpoints/pycode/held_out_prompts.jsonl
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

from corpus import split

BEFORE = 12  # lines of context above the function
INSIDE = 3  # lines of the function that are given
PROMPTS = 64


def openings(path: Path) -> Iterator[str]:
    """Each function of at least eight lines: some lines above it, its head, and its first lines."""
    source = path.read_text("utf-8")
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 8:
            first = max(0, node.lineno - 1 - BEFORE)
            prompt = "".join(lines[first : node.lineno + INSIDE]).rstrip()
            if prompt.isascii() and 200 < len(prompt) < 900:
                yield prompt


def main() -> None:
    _, held_out = split()
    candidates = [next(openings(path), None) for path in held_out]
    chosen = [(path, prompt) for path, prompt in zip(held_out, candidates, strict=True) if prompt is not None]
    step = max(1, len(chosen) // PROMPTS)
    for path, prompt in chosen[::step][:PROMPTS]:
        print(json.dumps({"file": "/".join(path.parts[-2:]), "prompt": prompt}))


if __name__ == "__main__":
    main()

"""Tokens per second of one, two, four and eight sequences decoded together, plain and with a drafter.

    python samples/bench/batching.py BUNDLE --prompts samples/checkpoints/pycode/held_out_prompts.jsonl

Every round decodes each (batch, drafter) once, so that what else the machine does reaches all of them; medians are printed.
A rate is all sequences' tokens after their first over the seconds of the call, less those of the prompts. The tokens of every
batch are compared with those of single runs: two operators of ONNX Runtime differ in the last bits, which decides near-ties.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from headstart.runtime.errors import HeadstartError
from headstart.runtime.loading import load
from headstart.runtime.model import Model
from headstart.runtime.results import Result


@dataclass
class Cell:
    """What was measured of one batch size and drafter: total tokens/s of each round, and sequences unlike their single runs."""

    batch: int
    drafter: str
    rates: list[float] = field(default_factory=list)
    differing: set[int] = field(default_factory=set)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def measure(model: Model, prompts: list[str], cells: list[Cell], rounds: int, new_tokens: int) -> None:
    """Fill the cells; the first round warms up and is not counted."""
    for number in range(rounds + 1):
        for cell in cells:
            started = time.perf_counter()
            results = decode(model, prompts[: cell.batch], cell.drafter, new_tokens)
            if number:
                cell.rates.append(total_rate(results, time.perf_counter() - started))


def decode(model: Model, prompts: list[str], drafter: str, new_tokens: int) -> list[Result]:
    return model.generate(prompts, max_new_tokens=new_tokens, drafter=drafter, ignore_end=True, temperature=0)


def total_rate(results: Sequence[Result], seconds: float) -> float:
    """Tokens/s of all sequences of a call that took `seconds`, of which each spent some on its own prompt."""
    prompts_s = sum(result.stats.prefill_s for result in results)
    return sum(len(result.token_ids) - 1 for result in results) / (seconds - prompts_s)


def compare(model: Model, prompts: list[str], cells: list[Cell], new_tokens: int) -> None:
    """Note which sequences of a batch got other tokens than alone, in plain decoding."""
    longest = max(cell.batch for cell in cells)
    alone = [decode(model, [prompt], "none", new_tokens)[0].token_ids for prompt in prompts[:longest]]
    for cell in cells:
        together = decode(model, prompts[: cell.batch], cell.drafter, new_tokens)
        cell.differing = {row for row, result in enumerate(together) if result.token_ids != alone[row]}


def table(cells: list[Cell]) -> str:
    """Markdown: total tokens/s, and how much that is of one sequence's with the same drafter."""
    lines = ["| drafter | sequences | tokens/s | of one | equal to single runs |", "| --- | --- | --- | --- | --- |"]
    for cell in cells:
        one = next(other for other in cells if other.drafter == cell.drafter and other.batch == 1)
        ratio = statistics.median(mine / its for mine, its in zip(cell.rates, one.rates, strict=True))
        equal = f"{cell.batch - len(cell.differing)} of {cell.batch}"
        lines.append(f"| {cell.drafter} | {cell.batch} | {cell.median:.1f} | {ratio:.2f} x | {equal} |")
    return "\n".join(lines)


def machine(threads: int) -> str:
    """The processor and the versions, in one line."""
    names = [line.split(":", 1)[1].strip() for line in cpu_lines() if line.startswith("model name")]
    packages = ", ".join(f"{name} {version(name)}" for name in ("headstart", "onnxruntime", "numpy"))
    return f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores, {threads} threads; {packages}"


def cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text("utf-8").splitlines() if file.is_file() else []


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help='JSON lines with a "prompt" each')
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--drafters", nargs="+", default=["none", "ngram"])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    try:
        prompts = [json.loads(line)["prompt"] for line in asked.prompts.read_text("utf-8").splitlines() if line]
        if len(prompts) < max(asked.batches):
            sys.exit(f"batching.py: {asked.prompts} has {len(prompts)} prompts; a batch of {max(asked.batches)} needs as many.")
        model = load(asked.bundle, threads=asked.threads)
        sizes = sorted({1, *asked.batches})
        cells = [Cell(batch, drafter) for drafter in asked.drafters for batch in sizes]
        compare(model, prompts, cells, asked.new_tokens)
        measure(model, prompts, cells, asked.rounds, asked.new_tokens)
    except HeadstartError as error:
        sys.exit(f"batching.py: {error}")
    print(f"{machine(asked.threads)}; {asked.new_tokens} new tokens, medians of {asked.rounds} rounds\n\n{table(cells)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

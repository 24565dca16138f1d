"""The measurement of batches: rates, ratios, and sequences that differ from their single runs."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "samples" / "bench"))  # where Python looks when it runs them

from batching import Cell, compare, machine, measure, table

from headstart.runtime.bundle import Bundle
from headstart.runtime.loading import load


def test_batches_are_measured_and_compared(bundle_of: Callable[[str], Bundle]) -> None:
    model = load(bundle_of("llama").path, threads=1)
    cells = [Cell(1, "none"), Cell(2, "none"), Cell(2, "ngram"), Cell(1, "ngram")]
    compare(model, ["abc", "hello there"], cells, new_tokens=6)
    measure(model, ["abc", "hello there"], cells, rounds=2, new_tokens=6)
    assert all(len(cell.rates) == 2 and min(cell.rates) > 0 and not cell.differing for cell in cells)
    assert "onnxruntime" in machine(1)


def test_the_table_says_how_much_of_one_and_what_differs() -> None:
    cells = [Cell(1, "none", [10.0, 20.0, 30.0]), Cell(8, "none", [40.0, 90.0, 120.0], differing={3})]
    assert table(cells).splitlines()[2:] == [
        "| none | 1 | 20.0 | 1.00 x | 1 of 1 |",
        "| none | 8 | 90.0 | 4.00 x | 7 of 8 |",
    ]

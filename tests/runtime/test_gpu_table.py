"""The table that a machine with a GPU prints: what it computes, over the stand-in; and what it says without one."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gpu import table
from tensorrt_stand_in import stand_in

from headstart.runtime.bundle import Bundle
from headstart.runtime.drafters.ngram import NGramDrafter
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.model import Model
from headstart.runtime.tokenizer import Tokenizer


def test_figures(bundle_of: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision of the tiny model: its logits near the export's; parity, costs and memory are filled in."""
    monkeypatch.setattr(table, "NEW_TOKENS", 12)
    monkeypatch.setattr(table, "ROUNDS", 1)
    bundle = bundle_of("llama")
    tokenizer = Tokenizer.load(bundle.path / "tokenizer")
    models = [
        Model(bundle, one, tokenizer, {"ngram": NGramDrafter()})
        for one in (stand_in(bundle, tmp_path), OnnxRuntimeEngine(bundle))
    ]  # type: ignore[arg-type]
    found = table.figures(*models, ["abc abc abc ", "hello"], lambda: 3 << 20, 1 << 20)
    assert 0 < found.difference < 0.02 and found.of == 2 and found.memory_mb == 2
    assert found.plain > 0 and found.speculative > 0 and set(table.SHOWN_ROWS) <= found.verify_ms.keys()
    assert found.cells().count("|") == 6 and "nan" not in found.cells()


@pytest.mark.parametrize("sample", table.SAMPLES)
def test_every_sample_has_inputs(sample: str) -> None:
    assert len(table.inputs_of(sample)) >= 4


def test_without_a_gpu_it_says_so() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU here")
    ran = subprocess.run([sys.executable, table.__file__], capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and ("No GPU was found" in ran.stderr or "pip install" in ran.stderr) and not ran.stdout

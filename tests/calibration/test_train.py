"""Training heads: they learn, they come out in the published format, and they come back in through the importer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from headstart.calibration import distill as distill_module
from headstart.calibration.distill import DistillOptions, HiddenData
from headstart.calibration.train import Head, TrainOptions, accuracy, loss_of, train_medusa
from headstart.exporter.heads.install import import_head
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import OptionError
from headstart.runtime.loading import load

SMALL = DistillOptions(prompt_tokens=8, new_tokens=24, sequences=24, batch=12)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return file


@pytest.mark.parametrize(("family", "own_projection"), [("medusa", True), ("medusa", False), ("blockwise", False)])
def test_heads_learn_what_the_base_says(
    family: str,
    own_projection: bool,
    text: Path,
    tmp_path: Path,
    checkpoint_of: Callable[[str], Path],
    bundle_of: Callable[[str], Bundle],
) -> None:
    options = TrainOptions(
        heads=2,
        layers=2,
        own_projection=own_projection,
        epochs=10,
        batch_tokens=256,
        learning_rate=5e-3,
        held_out=0.2,
        distill=SMALL,
        family=family,
    )
    untrained = TrainOptions(heads=2, own_projection=own_projection, epochs=1, learning_rate=0.0, held_out=0.2, distill=SMALL)
    base = train_medusa(checkpoint_of("llama"), [text], tmp_path / "untrained", untrained)
    report = train_medusa(checkpoint_of("llama"), [text], tmp_path / "heads", options)
    assert report["final_loss"] < base["final_loss"] - 0.5
    for ranks in report["held_out_accuracy"]:
        assert len(ranks) == 10 and ranks == sorted(ranks)
    config = json.loads((tmp_path / "heads/config.json").read_text())
    assert config["medusa_num_heads"] == 2 and config["medusa_num_layers"] == 2
    assert ("version" in config) != own_projection
    bundle = Path(shutil.copytree(bundle_of("llama").path, tmp_path / "bundle"))
    assert import_head(bundle, tmp_path / "heads").heads == 2
    model = load(bundle)
    assert (
        model.generate("fox", max_new_tokens=16, drafter="medusa").text
        == model.generate("fox", max_new_tokens=16, drafter="none").text
    )


def test_labels_are_two_ahead_and_further() -> None:
    """A head that copies its input one-hot gets the loss of exactly the shifted labels."""
    base = torch.eye(12) * 20
    heads = nn.ModuleList([Head(base, 1, False), Head(base, 1, False)])
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    two_ahead = nn.functional.one_hot(tokens.roll(-2, 1), 12).float()
    ranks = accuracy(heads, HiddenData(tokens, two_ahead))
    assert ranks[0][0] == 1.0 and ranks[1][0] == 0.0
    assert loss_of(heads[:1], tokens, two_ahead).item() < 1e-6


def test_wrong_data(tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> None:
    (tmp_path / "tiny.txt").write_text("abc")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(OptionError, match="at least"):
        train_medusa(checkpoint_of("llama"), [tmp_path / "tiny.txt"], tmp_path / "out")
    with pytest.raises(OptionError, match="UTF-8"):
        train_medusa(checkpoint_of("llama"), [tmp_path / "binary"], tmp_path / "out")
    with pytest.raises(OptionError, match="No training files"):
        train_medusa(checkpoint_of("llama"), [], tmp_path / "out")
    with pytest.raises(OptionError, match="layers must be at least 1"):
        TrainOptions(layers=0)
    assert not (tmp_path / "out").exists()


def test_options_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="sequences must be at least 1"):
        DistillOptions(sequences=0)
    with pytest.raises(OptionError, match="temperature must be above 0"):
        DistillOptions(temperature=0.0)
    with pytest.raises(OptionError, match="family must be medusa or blockwise, got 'eagle'"):
        TrainOptions(family="eagle")
    with pytest.raises(OptionError, match="at least 34 tokens, got 32"):
        TrainOptions(heads=32, distill=SMALL)


def test_no_original_text(text: Path, tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> None:
    distilled = DistillOptions(prompt_tokens=8, new_tokens=8, sequences=4, batch=2, original=0.0)
    report = train_medusa(checkpoint_of("llama"), [text], tmp_path / "heads", TrainOptions(epochs=1, distill=distilled))
    assert report["training_tokens"] + report["held_out_tokens"] == 4 * 16


def test_nothing_is_written_when_training_fails(
    text: Path, tmp_path: Path, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill_module, "_free_memory_bytes", lambda: 1000)
    with pytest.raises(OptionError, match=r"GB of memory.* Fix: --sequences 1\."):
        train_medusa(checkpoint_of("llama"), [text], tmp_path / "heads", TrainOptions(distill=SMALL))
    monkeypatch.undo()
    with pytest.raises(OptionError, match="Training diverged"):
        options = TrainOptions(learning_rate=float("inf"), epochs=2, batch_tokens=64, distill=SMALL)
        train_medusa(checkpoint_of("llama"), [text], tmp_path / "heads", options)
    assert not list(tmp_path.glob("*heads*"))

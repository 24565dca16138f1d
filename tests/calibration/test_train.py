"""Training heads: they learn, they come out in the published format, and they come back in through the importer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from headstart.calibration import distill as distill_module
from headstart.calibration import train as train_module
from headstart.calibration.distill import IGNORED, DistillOptions, HiddenData, cut
from headstart.calibration.distill import _continued as continued
from headstart.calibration.head_modules import MEDUSA, Base, Head, HydraHead
from headstart.calibration.train import (
    OUTSIDE,
    TrainOptions,
    accuracy,
    drafted_tokens,
    drafting,
    examples,
    loss_of,
    train_heads,
)
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


@pytest.mark.parametrize(
    ("family", "own_projection"), [("medusa", True), ("medusa", False), ("blockwise", False), ("hydra", True)]
)
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
    base = train_heads(checkpoint_of("llama"), [text], tmp_path / "untrained", untrained)
    report = train_heads(checkpoint_of("llama"), [text], tmp_path / "heads", options)
    assert report["final_loss"] < base["final_loss"] - 0.5
    for ranks in report["held_out_accuracy"]:
        assert len(ranks) == 10 and ranks == sorted(ranks)
    config = json.loads((tmp_path / "heads/config.json").read_text())
    published = "hydra" if family == "hydra" else "medusa"
    assert config[f"{published}_num_heads"] == 2 and config[f"{published}_num_layers"] == 2
    assert ("version" in config) != own_projection
    bundle = Path(shutil.copytree(bundle_of("llama").path, tmp_path / "bundle"))
    assert import_head(bundle, tmp_path / "heads").heads == 2
    model = load(bundle)
    assert (
        model.generate("fox", max_new_tokens=16, drafter=published).text
        == model.generate("fox", max_new_tokens=16, drafter="none").text
    )


@pytest.mark.parametrize("family", ["medusa", "blockwise", "hydra"])
def test_heads_for_the_most_frequent_tokens(
    family: str, text: Path, tmp_path: Path, checkpoint_of: Callable[[str], Path], bundle_of: Callable[[str], Bundle]
) -> None:
    """The weights stay small, what is drafted is one of those tokens, and the output does not change."""
    options = TrainOptions(heads=2, own_projection=False, epochs=2, held_out=0.2, distill=SMALL, draft_vocab=12, family=family)
    report = train_heads(checkpoint_of("llama"), [text], tmp_path / "heads", options)
    assert report["drafted_tokens"] == 12 and 0 < report["held_out_covered"] < 1
    stored = sum(file.stat().st_size for file in (tmp_path / "heads").glob("*.safetensors"))
    inner = {"medusa": 64, "blockwise": 2 * 256, "hydra": 2 * (2 + 3) / 2 * 64}[family]  # rows of weights for each channel
    assert stored < 2 * 2 * 64 * (inner + 16) + 2000
    bundle = Path(shutil.copytree(bundle_of("llama").path, tmp_path / "bundle"))
    assert not import_head(bundle, tmp_path / "heads").shared
    model = load(bundle)
    texts = [
        model.generate("fox", max_new_tokens=16, drafter=drafter).text
        for drafter in ("hydra" if family == "hydra" else "medusa", "none")
    ]
    assert texts[0] == texts[1]


def test_drafted_tokens_are_those_of_the_text() -> None:
    tokens = torch.tensor([[7, 7, 3, 3, 5, IGNORED], [7, 9, 1, 3, 7, 2]])
    data = HiddenData(tokens, torch.zeros(2, 6, 4))
    assert drafted_tokens(data, 40, 3).tolist() == [1, 3, 7]  # of equal frequency the lowest
    assert drafted_tokens(data, 40, 30).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]  # as many as are ranked, seen or not
    labels = drafting(data, torch.tensor([1, 3, 7]), 12).labels
    assert labels is not None and labels.tolist() == [[2, 2, 1, 1, OUTSIDE, IGNORED], [2, OUTSIDE, 0, 1, 2, OUTSIDE]]


def test_tokens_that_are_not_drafted_teach_nothing_and_count_as_misses() -> None:
    heads = nn.ModuleList([medusa(torch.eye(12) * 20)])
    labels = torch.tensor([[0, 1, 2, OUTSIDE, 0]])
    ahead = nn.functional.one_hot(labels.clamp(min=0).roll(-2, 1), 12).float()
    data = HiddenData(torch.zeros(1, 5, dtype=torch.int64), ahead, labels)
    assert loss_of(heads, data).item() < 1e-6
    assert accuracy(heads, data)[0][0] == pytest.approx(2 / 3, abs=1e-3)


@pytest.mark.parametrize("family", ["medusa", "hydra"])
def test_an_interrupted_training_goes_on(
    family: str, text: Path, tmp_path: Path, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the base writes, and again while the heads learn: the result is that of one run."""
    monkeypatch.setattr(train_module, "SAVE_SECONDS", 0.0)
    options = TrainOptions(heads=2, epochs=3, batch_tokens=256, held_out=0.2, distill=SMALL, family=family)

    def run(name: str, stop: tuple[str, int] = ("", 0)) -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []

        def progress(what: str, done: int, of: int) -> None:
            seen.append((what, done))
            if (what, done) == stop:
                raise KeyboardInterrupt

        try:
            train_heads(checkpoint_of("llama"), [text], tmp_path / name, options, progress=progress)
        except KeyboardInterrupt:
            assert stop[0] and not (tmp_path / name).exists()
        return seen

    whole = run("whole")
    written = []
    monkeypatch.setattr(distill_module, "_continued", lambda *arguments: written.append(1) or continued(*arguments))
    run("parts", ("self-distillation", 1))
    run("parts", ("training", 5))
    last = run("parts")
    assert len(written) == 2 and last[-1] == whole[-1]
    assert last.index(("training", 6)) == len(last) - (whole[-1][1] - 5), "training began again"
    weights = [load_file(tmp_path / name / f"{family}_lm_head.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not list(tmp_path.glob("*.work"))


def test_text_is_kept_for_other_heads(text: Path, tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> None:
    """A work folder of one's own stays; a damaged piece of it is made again, and other text gets pieces of its own."""
    work, distilled = tmp_path / "work", DistillOptions(prompt_tokens=8, new_tokens=24, sequences=24, batch=12, original=0.0)

    def heads(name: str, count: int, **changed: Any) -> None:
        options = TrainOptions(heads=count, epochs=1, distill=distilled, **changed)
        train_heads(checkpoint_of("llama"), [text], tmp_path / name, options, work=work)

    heads("one", 1)
    pieces = {file: file.stat().st_mtime_ns for file in work.iterdir()}
    assert len(pieces) == 2
    damaged = next(iter(pieces))
    damaged.write_bytes(damaged.read_bytes()[:100])
    heads("two", 2)
    changed = {file for file in work.iterdir() if file.stat().st_mtime_ns != pieces.get(file)}
    assert changed == {damaged}
    heads("other", 1, seed=1)
    assert len(list(work.iterdir())) == 4


def test_prompts_open_as_the_tokenizer_opens_texts() -> None:
    rows = cut(np.arange(10, 200), [2, 3], 8, 5, seed=0)
    assert rows.shape == (5, 8) and (rows[:, :2] == torch.tensor([2, 3])).all()
    assert (rows[:, 2:].diff() == 1).all() and rows[:, 2:].min() >= 10


def test_labels_are_two_ahead_and_further() -> None:
    """A head that copies its input one-hot gets the loss of exactly the shifted labels."""
    base = torch.eye(12) * 20
    heads = nn.ModuleList([medusa(base), medusa(base)])
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    two_ahead = nn.functional.one_hot(tokens.roll(-2, 1), 12).float()
    ranks = accuracy(heads, HiddenData(tokens, two_ahead))
    assert ranks[0][0] == 1.0 and ranks[1][0] == 0.0
    assert loss_of(heads[:1], HiddenData(tokens, two_ahead)).item() < 1e-6


def test_hydra_reads_the_tokens_between() -> None:
    """Tokens that follow from the one before, and not from the states: heads learn it, and what is saved says it unscaled."""
    torch.manual_seed(0)
    follows = torch.randperm(12)
    tokens = torch.randint(12, (64, 1))
    for _ in range(9):
        tokens = torch.cat([tokens, follows[tokens[:, -1:]]], 1)
    base = Base(torch.randn(12, 16), torch.randn(12, 16) / 50, ratio=50.0)
    data = HiddenData(tokens, torch.randn(64, 10, 16).half())
    heads = nn.ModuleList([HydraHead(base, number, 2, False) for number in range(2)])
    optimizer = torch.optim.Adam(heads.parameters(), 0.02)
    for _ in range(150):
        loss = loss_of(heads, data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(ranks[0] > 0.99 for ranks in accuracy(heads, data)), "measured without dropout"
    states, read, _ = examples(1, data)
    saved = heads[1].published(1)
    x = torch.cat([states, base.embeddings[read].flatten(1)], 1)
    inner = x @ saved["hydra_mlp.1.0.linear.weight"].T + saved["hydra_mlp.1.0.linear.bias"]
    y = x @ saved["hydra_mlp.1.0.res_connection.weight"].T + saved["hydra_mlp.1.0.res_connection.bias"]
    y = y + nn.functional.silu(inner)
    y = y + nn.functional.silu(y @ saved["hydra_mlp.1.1.linear.weight"].T + saved["hydra_mlp.1.1.linear.bias"])
    torch.testing.assert_close(y @ base.lm_head.T, heads[1](states, read), rtol=1e-4, atol=1e-3)


def medusa(lm_head: torch.Tensor) -> Head:
    return Head(Base(lm_head, lm_head), 1, False, MEDUSA)


def test_wrong_data(tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> None:
    (tmp_path / "tiny.txt").write_text("abc")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(OptionError, match="at least"):
        train_heads(checkpoint_of("llama"), [tmp_path / "tiny.txt"], tmp_path / "out")
    with pytest.raises(OptionError, match="UTF-8"):
        train_heads(checkpoint_of("llama"), [tmp_path / "binary"], tmp_path / "out")
    with pytest.raises(OptionError, match="No training files"):
        train_heads(checkpoint_of("llama"), [], tmp_path / "out")
    with pytest.raises(OptionError, match="layers must be at least 1"):
        TrainOptions(layers=0)
    assert not (tmp_path / "out").exists()


def test_options_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="sequences must be at least 1"):
        DistillOptions(sequences=0)
    with pytest.raises(OptionError, match="temperature must be above 0"):
        DistillOptions(temperature=0.0)
    with pytest.raises(OptionError, match="family must be medusa, blockwise or hydra, got 'eagle'"):
        TrainOptions(family="eagle")
    with pytest.raises(OptionError, match="draft_vocab must be 0, for all tokens, or at least 10, got 5"):
        TrainOptions(draft_vocab=5)
    with pytest.raises(OptionError, match="at least 34 tokens, got 32"):
        TrainOptions(heads=32, distill=SMALL)


def test_no_original_text(text: Path, tmp_path: Path, checkpoint_of: Callable[[str], Path]) -> None:
    distilled = DistillOptions(prompt_tokens=8, new_tokens=8, sequences=4, batch=2, original=0.0)
    report = train_heads(checkpoint_of("llama"), [text], tmp_path / "heads", TrainOptions(epochs=1, distill=distilled))
    assert report["training_tokens"] + report["held_out_tokens"] == 4 * 16


def test_nothing_is_written_when_training_fails(
    text: Path, tmp_path: Path, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill_module, "_free_memory_bytes", lambda: 1000)
    with pytest.raises(OptionError, match=r"GB of memory.* Fix: --sequences 1\."):
        train_heads(checkpoint_of("llama"), [text], tmp_path / "heads", TrainOptions(distill=SMALL))
    monkeypatch.undo()
    with pytest.raises(OptionError, match="Training diverged"):
        options = TrainOptions(learning_rate=float("inf"), epochs=2, batch_tokens=64, distill=SMALL)
        train_heads(checkpoint_of("llama"), [text], tmp_path / "heads", options)
    assert [file.name for file in tmp_path.glob("*heads*")] == ["heads.work"]  # the text is good for another rate

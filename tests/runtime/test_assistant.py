"""An assistant: another decoder behind the target's own encoder, exported without one and fed with the target's states."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import save_checkpoint, tiny_model

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.calibration.report import compare
from headstart.calibration.verify import verify
from headstart.exporter.build import build
from headstart.exporter.export import export
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import CheckpointError, OptionError, PromptError
from headstart.runtime.loading import load
from headstart.runtime.model import Model


def smaller(model: Any) -> Any:
    """The same encoder and embeddings, and the first of the decoder's two layers."""
    config = copy.deepcopy(model.config)
    config.decoder_layers = 1
    assistant = type(model)(config).eval()
    kept = assistant.state_dict()
    assistant.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in kept})
    assistant.generation_config = copy.deepcopy(model.generation_config)
    return assistant


def sources_of(model: Model) -> list[Any]:
    generator = np.random.default_rng(4)
    if model.bundle.manifest.model.source == "text":
        return ["a source", "and another, longer one"]
    return [generator.standard_normal((20, 120)).astype(np.float32) for _ in range(2)]


@pytest.fixture(scope="module", params=["bart", "whisper"])
def folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    bundle_of: Callable[[str], Bundle],
    checkpoint_of: Callable[[str], Path],
) -> Path:
    """A target, its smaller assistant, and the target once more as an assistant of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "target").symlink_to(bundle_of(request.param).path)
    checkpoint = save_checkpoint(smaller(tiny_model(request.param)), folder / "smaller")
    export(checkpoint, folder / "assistant", assistant_of=folder / "target")
    export(checkpoint_of(request.param), folder / "twin", assistant_of=folder / "target")
    return folder


def decode(folder: Path, assistant: str | None, **options: Any) -> list[Any]:
    draft_model = None if assistant is None else folder / assistant
    model = load(folder / "target", threads=1, draft_model=draft_model)
    drafter = "none" if assistant is None else "draft_model"
    return model.generate(sources_of(model), max_new_tokens=25, ignore_end=True, drafter=drafter, **options)


def test_an_assistant_changes_no_token(folder: Path) -> None:
    plain = [result.token_ids for result in decode(folder, None)]
    assert [result.token_ids for result in decode(folder, "assistant")] == plain
    twins = decode(folder, "twin", draft_nodes=5)
    assert [result.token_ids for result in twins] == plain
    assert [result.stats.verify_calls for result in twins] == [4, 4], "a draft equal to the target is always right"


def test_an_assistant_has_no_encoder(folder: Path) -> None:
    graphs = {name: folder / name / "graphs" for name in ("target", "twin")}
    sizes = {name: sum(file.stat().st_size for file in path.iterdir()) for name, path in graphs.items()}
    assert sizes["twin"] < sizes["target"] - 50_000
    with pytest.raises(PromptError, match="reads encoder states of the target"):
        load(folder / "twin").generate("a source")


def test_an_assistant_is_verified_and_built_like_any_bundle(folder: Path, tmp_path: Path) -> None:
    assert verify(folder / "assistant", samples=100).ok
    with pytest.raises(OptionError, match="is an assistant"):
        verify(folder / "assistant", checkpoint=folder / "smaller")
    plain = [result.token_ids for result in decode(folder, None)]
    with pytest.raises(OptionError, match="is an assistant: what it reads are the states"):
        quantize(folder / "assistant", tmp_path / "small", QuantizeOptions(method="gptq"), tmp_path / "sources.txt")
    with pytest.raises(OptionError, match="is an assistant: it reads the states"):
        compare([folder / "assistant"] * 2, tmp_path / "sources.txt")
    build(folder / "assistant")
    assert [result.token_ids for result in decode(folder, "assistant")] == plain


def test_only_the_target_s_own_encoder_will_do(folder: Path, tmp_path: Path, bundle_of: Callable[[str], Bundle]) -> None:
    other = smaller(tiny_model("bart"))
    with torch.no_grad():
        next(other.get_encoder().parameters()).add_(1.0)
    save_checkpoint(other, tmp_path / "other")
    with pytest.raises(CheckpointError, match="has the target's very encoder"):
        export(tmp_path / "other", tmp_path / "bundle", assistant_of=folder / "target")
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(OptionError, match="the assistant of another model"):
        load(bundle_of("llama").path, draft_model=folder / "assistant")

"""Every export is compared with its checkpoint, and what differs is refused; nothing is left at the output."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import BERT_SIZES, GATED, save_checkpoint, tiny_model
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForCausalLM

from headstart.exporter import architectures, step, tracing
from headstart.exporter.architectures import always_clamped, require_inputs
from headstart.exporter.build import build
from headstart.exporter.comparison import all_logits
from headstart.exporter.export import export
from headstart.exporter.golden import reference_logits
from headstart.runtime.engines.info import EngineInfo
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import CheckpointError
from headstart.runtime.loading import load


def wrong_mask(step_: Any, slots: int, window: int) -> Any:
    distance = step_.position_ids[:, :, None] - step.slot_positions(step_, slots)[:, None, :]
    return (distance < window - 1)[:, None]


def test_a_graph_that_differs_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sliding window of one row too few, seen neither by tracing nor by the check in torch that is turned off here."""
    from headstart.exporter import conformance

    checkpoint = save_checkpoint(tiny_model("mistral"), tmp_path / "checkpoint")
    monkeypatch.setattr(tracing, "inside_window", wrong_mask)
    monkeypatch.setattr(conformance, "check_decoder", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"exported decoder .* logits .* differ by \d.*--no-check"):
        export(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert export(checkpoint, tmp_path / "bundle", check=False).manifest.model.layers == 2


def test_the_check_in_torch_sees_it_before_tracing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = 4
    monkeypatch.setattr(tracing, "inside_window", wrong_mask)
    with pytest.raises(CheckpointError, match="run step by step"):
        export(save_checkpoint(model, tmp_path / "checkpoint"), tmp_path / "bundle")


def test_weights_of_nan_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(CheckpointError, match="NaN"):
        export(save_checkpoint(model, tmp_path / "checkpoint"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(("name", "config"), [(BertLMHeadModel, BertConfig), (RobertaForCausalLM, RobertaConfig)])
def test_an_encoder_is_no_causal_model(name: Any, config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = name(config(**{**BERT_SIZES, "is_decoder": False})).eval()
    with pytest.raises(CheckpointError, match=r"no decoder \(\"is_decoder\" is false"):
        export(save_checkpoint(model, tmp_path / "checkpoint"), tmp_path / "bundle")


@pytest.mark.parametrize("epsilon", [1e-8, 1e-12])
def test_tiny_epsilons_and_a_row_of_zeros(epsilon: float, tmp_path: Path) -> None:
    """Canonical and lowered, against torch; the prompt holds the token whose embedding is all zeros."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**GATED, "rms_norm_eps": epsilon})).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
    bundle = export(save_checkpoint(model, tmp_path / "checkpoint"), tmp_path / "bundle")
    ids = np.array([5, 0, 7, 0, 0, 9])
    wanted = reference_logits(model, ids[None])[0]
    assert np.isfinite(wanted).all()
    assert np.abs(all_logits(OnnxRuntimeEngine(bundle), ids) - wanted).max() <= 1e-4 * np.ptp(wanted)
    assert isinstance(build(bundle.path), EngineInfo)
    assert np.abs(all_logits(load(bundle.path).engine, ids) - wanted).max() <= 1e-4 * np.ptp(wanted)


def test_inputs_that_a_forward_drops_are_an_error() -> None:
    class Renamed(torch.nn.Module):
        def forward(self, input_ids: Any, mask: Any, **others: Any) -> None: ...

    with pytest.raises(CheckpointError, match=r"no attention_mask and no encoder_attention_mask"):
        require_inputs(Renamed(), "attention_mask", "encoder_attention_mask")


def test_clamping_belongs_to_one_forward_of_one_thread() -> None:
    model, seen = tiny_model("llama").half(), []
    with always_clamped(model):
        assert not torch.isfinite(torch.ones(2)).all()
        thread = threading.Thread(target=lambda: seen.append(bool(torch.isfinite(torch.ones(2)).all())))
        thread.start()
        thread.join()
    assert seen == [True] and torch.isfinite(torch.ones(2)).all()
    assert architectures.position_shift(model.model) == 0

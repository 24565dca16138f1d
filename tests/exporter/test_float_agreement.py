"""Quantized weights that mean nothing are reported: by `quantize`, by `build`, in engine.json, and on the command line."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import save_checkpoint, tiny_model

from headstart.calibration.quantize import quantize
from headstart.exporter.build import build
from headstart.exporter.export import export
from headstart.exporter.float_agreement import agreement, forced_texts
from headstart.exporter.golden import float_reference, read_golden
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import ENGINE_FILE, engine_folder
from headstart.runtime.errors import EngineError
from headstart.runtime.precision import LEAST_AGREEMENT, FloatAgreement
from headstart.screen import describe_agreement

BundleOf = Callable[[str], Bundle]
POOR = r"With int8 weights the model picks \d+% of the float model's greedy tokens"


def test_int8_weights_without_outliers_agree_and_nothing_is_said(bundle_of: BundleOf, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        bundle = quantize(bundle_of("llama").path, tmp_path / "int8")
        info = build(bundle.path)
    assert float(bundle.manifest.quantization["greedy_agreement"]) > 0.9
    found = info.float_agreement
    assert found is not None and found.greedy > 0.9 and 0 < found.median <= found.largest < 0.1
    written = json.loads((engine_folder(bundle, "cpu") / ENGINE_FILE).read_text("utf-8"))
    assert written["float_agreement"]["greedy"] == found.greedy
    assert "POOR" not in describe_agreement(found)


def test_one_input_channel_a_thousand_times_the_others_is_reported(tmp_path: Path) -> None:
    """One scale per output channel rounds all other inputs' weights to zero; the lowered graph equals the quantized one."""
    model = tiny_model("llama")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[:, 0] *= 1000
    save_checkpoint(model, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "float")
    with pytest.warns(RuntimeWarning, match=POOR):
        bundle = quantize(tmp_path / "float", tmp_path / "int8")
    with pytest.warns(RuntimeWarning, match=POOR):
        info = build(bundle.path)
    assert float(bundle.manifest.quantization["greedy_agreement"]) < LEAST_AGREEMENT
    assert info.float_agreement is not None and info.float_agreement.greedy < LEAST_AGREEMENT
    assert f"(POOR: below {LEAST_AGREEMENT:.0%})" in describe_agreement(info.float_agreement)


def test_a_float_bundle_has_nothing_to_compare_with(bundle_of: BundleOf, tmp_path: Path) -> None:
    shutil.copytree(bundle_of("llama").path, tmp_path / "float")
    assert float_reference(read_golden(Bundle.load(tmp_path / "float"))) is None
    assert build(tmp_path / "float").float_agreement is None


def test_the_float_model_agrees_with_itself_and_each_other_token_counts(bundle_of: BundleOf) -> None:
    golden = read_golden(bundle_of("llama"))
    count, length = golden["input_ids"].shape
    tokens, vocab_size = golden["greedy"].shape[1], 300
    logits = np.full((count, length + tokens - 1, vocab_size), -1e3, np.float32)
    np.put_along_axis(logits[:, :length], golden["top_ids"].astype(np.int64), golden["top_logits"], axis=-1)
    np.put_along_axis(logits[:, length - 1 :], golden["greedy"][..., None], 1e3, axis=-1)
    last = golden["top_logits"][:, -1]
    np.put_along_axis(logits[:, length - 1], golden["top_ids"][:, -1].astype(np.int64), last, axis=-1)
    assert forced_texts(golden["input_ids"], golden).shape == logits.shape[:2]
    assert agreement(logits, golden) == FloatAgreement(1.0, 0.0, 0.0)
    logits[0, -1] = -logits[0, -1]
    assert agreement(logits, golden).greedy == 1 - 1 / (count * tokens)
    logits[0, 0, 0] = np.nan
    with pytest.raises(EngineError, match="computes NaN or infinity"):
        agreement(logits, golden)

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

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.build import build
from headstart.exporter.export import export
from headstart.exporter.float_agreement import agreement, forced_texts
from headstart.exporter.golden import float_reference, read_golden
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import ENGINE_FILE, engine_folder
from headstart.runtime.errors import EngineError
from headstart.runtime.precision import LEAST_AGREEMENT, LIMITS, FloatAgreement
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


def test_weights_of_too_few_bits_are_reported(bundle_of: BundleOf, tmp_path: Path) -> None:
    """The lowered graph equals the quantized one: only the float model shows it."""
    with pytest.warns(RuntimeWarning, match=POOR.replace("int8", "int4")):
        bundle = quantize(bundle_of("llama").path, tmp_path / "int4", QuantizeOptions(weights="int4", rotation=False))
    with pytest.warns(RuntimeWarning, match=POOR.replace("int8", "int4")):
        info = build(bundle.path)
    found = info.float_agreement
    assert info.relative_difference is not None and info.relative_difference < 0.05
    assert found is not None and found.greedy < LEAST_AGREEMENT
    written = json.loads((engine_folder(bundle, "cpu") / ENGINE_FILE).read_text("utf-8"))
    assert written["float_agreement"]["greedy"] == found.greedy
    assert f"(POOR: below {LEAST_AGREEMENT:.0%})" in describe_agreement(found)


def outlier_bundle(folder: Path) -> Path:
    """A llama whose layers multiply one input channel by 1,000 times the others, which their norms have made as small."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, linears in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[0] /= 1000
                for linear in linears:
                    linear.weight[:, 0] *= 1000
    save_checkpoint(model, folder / "checkpoint")
    return export(folder / "checkpoint", folder / "float").path


def test_one_input_channel_a_thousand_times_the_others_is_reported(tmp_path: Path) -> None:
    """The float model is a usual one; one scale per output channel rounds the weights of all other inputs to zero."""
    with pytest.warns(RuntimeWarning, match=POOR):
        bundle = quantize(outlier_bundle(tmp_path), tmp_path / "int8")
    assert float(bundle.manifest.quantization["greedy_agreement"]) < LEAST_AGREEMENT
    with pytest.warns(RuntimeWarning, match=POOR):  # 8 bits round away most of the rest: not a defect of the lowering
        info = build(bundle.path)
    assert not info.differences["decoder"].within(LIMITS["int8_per_row"])


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

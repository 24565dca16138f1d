"""Encoder-decoders on the CPU: both graphs lowered, both quantized, and the same texts as the canonical graphs give."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from headstart.calibration.quantize import quantize
from headstart.calibration.tune import TuneOptions, tune
from headstart.calibration.verify import verify
from headstart.exporter.build import build
from headstart.exporter.passes.linear import linears
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import ENGINE_FILE, engine_folder
from headstart.runtime.errors import OptionError
from headstart.runtime.loading import load

BundleOf = Callable[[str], Bundle]
# Layers of two whose self-attention keeps the portable form: soft caps are spelled out, and T5Gemma 2 joins both attentions.
PORTABLE = {"t5gemma": 2, "t5gemma2": 2}


def built_info(bundle: Path) -> dict[str, object]:
    build(bundle)
    info: dict[str, object] = json.loads((engine_folder(Bundle.load(bundle), "cpu") / ENGINE_FILE).read_text())
    return info


@pytest.mark.parametrize("name", ["t5", "bart", "m2m_100", "t5gemma2", "whisper", "moonshine"])
def test_both_lowered_graphs_equal_the_canonical_ones(bundle_of: BundleOf, tmp_path: Path, name: str) -> None:
    shutil.copytree(bundle_of(name).path, tmp_path / name)
    info = built_info(tmp_path / name)
    assert info["relative_difference"] < 3e-6
    assert info["passes"]["fused_attention_layers"] == 2 - PORTABLE.get(name, 0)
    assert {"decoder", "decoder_batch", "encoder"} < set(info["graphs"])
    assert verify(tmp_path / name, max_new_tokens=12, samples=100).ok


@pytest.mark.parametrize("name", ["t5", "bart", "moonshine"])
def test_both_graphs_are_quantized(bundle_of: BundleOf, tmp_path: Path, name: str) -> None:
    bundle = quantize(bundle_of(name).path, tmp_path / name)
    for graph in bundle.manifest.graphs.values():
        model = ir.load(bundle.path / graph.file)
        assert {node.domain for node in model.graph} == {""}
        assert all(linear.quantized for linear in linears(model))
    assert bundle.manifest.model.source and len(bundle.manifest.graphs["decoder"].reads) == 2
    info = built_info(bundle.path)
    assert info["passes"]["integer_products"] > 0
    assert 1e-6 < info["relative_difference"] < 0.15
    encoder = ir.load(engine_folder(bundle, "cpu") / "encoder.onnx")
    assert any(node.op_type == "MatMulIntegerToFloat" for node in encoder.graph)
    assert verify(bundle.path, max_new_tokens=12, samples=100).ok


def test_a_shared_embedding_is_stored_once(bundle_of: BundleOf, tmp_path: Path) -> None:
    """T5's one table serves the encoder, the decoder and the LM head, before and after quantization."""
    for bundle in (bundle_of("t5"), quantize(bundle_of("t5").path, tmp_path / "small")):
        encoder = ir.load(bundle.path / bundle.manifest.graphs["encoder"].file)
        tables = [value.const_value for value in encoder.graph.initializers.values() if value.shape[:1] == (300,)]
        assert tables and all(table.location == "decoder.onnx.data" for table in tables)


def test_a_tuned_bundle_decodes_as_an_untuned_one(bundle_of: BundleOf, tmp_path: Path) -> None:
    shutil.copytree(bundle_of("t5").path, tmp_path / "t5")
    tuning = tune(tmp_path / "t5", ["a source", "another"], options=TuneOptions(max_new_tokens=16, max_nodes=8))
    assert "ngram" in tuning.drafters
    texts = [load(tmp_path / "t5", tuned=tuned).generate("a source", max_new_tokens=16).token_ids for tuned in (True, False)]
    assert texts[0] == texts[1]


def test_what_is_refused(bundle_of: BundleOf) -> None:
    with pytest.raises(OptionError, match="reads no source, the target text"):
        load(bundle_of("t5").path, draft_model=bundle_of("llama").path)

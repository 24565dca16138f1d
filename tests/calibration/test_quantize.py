"""Quantized bundles: what is stored, that it is standard ONNX and self-contained, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.calibration.rounding import WeightScheme, round_to_nearest
from headstart.calibration.verify import verify
from headstart.exporter.build import build
from headstart.exporter.comparison import all_logits
from headstart.exporter.passes.linear import linears
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import BundleError, OptionError, OutputError
from headstart.runtime.loading import load

BundleOf = Callable[[str], Bundle]


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32), (4, 64)])
def test_rounding_is_to_the_nearest(bits: int, group: int) -> None:
    weight = np.random.default_rng(0).standard_normal((128, 24)).astype(np.float32)
    weight[:, 3] = 0
    rounded = round_to_nearest(weight, WeightScheme(bits, group))
    step = np.repeat(np.atleast_2d(rounded.scales), 128 // len(np.atleast_2d(rounded.scales)), axis=0)
    assert (np.abs(weight - rounded.dequantized()) <= step / 2 + 1e-6).all()
    assert np.abs(rounded.values).max() == (127 if bits == 8 else 7)
    assert not rounded.values[:, 3].any()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_graphs_stay_standard_and_weights_shrink(bundle_of: BundleOf, tmp_path: Path, weights: str) -> None:
    bundle = quantize(bundle_of("llama_tied").path, tmp_path / "small", QuantizeOptions(weights=weights))
    model = ir.load(bundle.path / "graphs/decoder.onnx")
    assert {node.domain for node in model.graph} == {""}
    found = list(linears(model))
    assert all(linear.quantized for linear in found)
    wanted = ir.DataType.INT8 if weights == "int8" else ir.DataType.INT4
    assert found[0].weight.dtype == wanted and found[-1].weight.dtype == ir.DataType.INT8
    size = {b.path: (b.path / "graphs/decoder.onnx.data").stat().st_size for b in (bundle, bundle_of("llama_tied"))}
    assert size[bundle.path] < 0.35 * size[bundle_of("llama_tied").path]
    assert Bundle.load(bundle.path).manifest.quantization["weights"] == weights
    assert verify(bundle.path, ["abc"], 8, samples=100).ok


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_layers_written_as_gemm_are_quantized_too(bundle_of: BundleOf, tmp_path: Path, name: str) -> None:
    bundle = quantize(bundle_of(name).path, tmp_path / "small")
    model = ir.load(bundle.path / "graphs/decoder.onnx")
    assert not any(node.op_type == "Gemm" for node in model.graph)
    found = list(linears(model))
    assert len(found) >= 9 and all(linear.quantized for linear in found)
    ids = np.arange(5, 25)
    before = all_logits(OnnxRuntimeEngine(bundle_of(name)), ids)
    assert np.abs(before - all_logits(OnnxRuntimeEngine(bundle), ids)).max() < 0.03 * np.ptp(before)


def test_tied_embedding_is_stored_once(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = quantize(bundle_of("llama_tied").path, tmp_path / "small")
    model = ir.load(bundle.path / "graphs/decoder.onnx")
    tables = [name for name, value in model.graph.initializers.items() if 300 in tuple(value.shape) and len(value.shape) == 2]
    assert len(tables) == 1


def test_none_leaves_a_part_alone(bundle_of: BundleOf, tmp_path: Path) -> None:
    options = QuantizeOptions(lm_head="none", embedding="none")
    bundle = quantize(bundle_of("llama").path, tmp_path / "small", options)
    found = list(linears(ir.load(bundle.path / "graphs/decoder.onnx")))
    assert not found[-1].quantized and all(linear.quantized for linear in found[:-1])


def test_int8_logits_are_near(bundle_of: BundleOf, tmp_path: Path) -> None:
    ids = np.arange(5, 37)
    before = all_logits(OnnxRuntimeEngine(bundle_of("llama")), ids)
    after = all_logits(OnnxRuntimeEngine(quantize(bundle_of("llama").path, tmp_path / "small")), ids)
    error = np.abs(before - after).max() / np.ptp(before)
    assert 1e-5 < error < 0.03


def test_heads_are_quantized_and_share_the_quantized_lm_head(pycode: Bundle, tmp_path: Path) -> None:
    bundle = quantize(pycode.path, tmp_path / "small")
    info = bundle.head("medusa")
    assert set(info.shared) == {"lm_head", "lm_head.scale"} and info.shared["lm_head"].dtype == "int8"
    hidden = np.random.default_rng(0).standard_normal((1, 1, info.hidden_size)).astype(np.float32)
    before, after = (OnnxRuntimeEngine(one).graph("heads/medusa").run({"hidden": hidden}) for one in (pycode, bundle))
    np.testing.assert_allclose(after["topk_log_probs"][:, :, 0], before["topk_log_probs"][:, :, 0], atol=0.3)
    assert (pycode.path / "heads/medusa/head.onnx.data").stat().st_size > (
        bundle.path / "heads/medusa/head.onnx.data"
    ).stat().st_size
    result = load(bundle.path).generate("def f(x):\n", max_new_tokens=24, drafter="medusa", ignore_end=True)
    assert result.stats.acceptance_length > 1.2


def test_twice_is_refused(bundle_of: BundleOf, tmp_path: Path) -> None:
    quantize(bundle_of("llama").path, tmp_path / "once")
    with pytest.raises(BundleError, match="is quantized already"):
        quantize(tmp_path / "once", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    with pytest.raises(OutputError, match="is not overwritten"):
        quantize(bundle_of("llama").path, tmp_path / "once")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "--weights 'int3' is unknown"),
        ({"weights": "int4", "group": 48}, "--group 48 is unknown"),
        ({"method": "magic"}, "--method 'magic' is unknown"),
        ({"lm_head": "int4"}, "--lm-head 'int4' is unknown"),
        ({"calibration_tokens": 3}, "--calibration-tokens 3 is too few"),
    ],
)
def test_unknown_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        QuantizeOptions(**options)  # type: ignore[arg-type]


def test_a_group_that_does_not_divide(bundle_of: BundleOf, tmp_path: Path) -> None:
    """Layers of 64 and 96 inputs in groups of at most 64: the latter take 32, and the manifest says so."""
    bundle = quantize(bundle_of("llama").path, tmp_path / "out", QuantizeOptions(weights="int4", group=64))
    decoder = ir.load(bundle.path / bundle.manifest.graphs["decoder"].file)
    groups = {linear.shape[0]: linear.shape[0] // len(linear.scales.const_value.numpy()) for linear in linears(decoder)}
    assert groups.pop(96) == 32 and bundle.manifest.quantization["other_groups"] == "2 of 32"
    assert 0 < build(bundle.path).relative_difference < 0.1  # which compares the CPU's form of it with the canonical one


@pytest.mark.parametrize(("inputs", "scheme"), [(96, (4, 32)), (128, (4, 64)), (80, (4, 16)), (40, (8, 0))])
def test_the_nearest_group(inputs: int, scheme: tuple[int, int]) -> None:
    assert WeightScheme(4, 64).fitting(inputs) == WeightScheme(*scheme)


def test_a_method_without_data(bundle_of: BundleOf, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--data FILE"):
        quantize(bundle_of("llama").path, tmp_path / "out", QuantizeOptions(method="gptq"))
    assert not (tmp_path / "out").exists()

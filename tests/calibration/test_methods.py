"""GPTQ, AWQ and SmoothQuant: less output error than plain rounding, a fold that changes nothing in float, refused data."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from headstart.calibration.feeds import DecoderFeeds
from headstart.calibration.methods import (
    InputScale,
    best_input_scale,
    clipped_scales,
    gptq,
    round_clipped,
    scale_inputs,
    smooth_input_scale,
)
from headstart.calibration.observers import Statistics, observe
from headstart.calibration.passages import WINDOW, calibration_windows, of_windows
from headstart.calibration.quantize import DECODER, QuantizeOptions, quantize
from headstart.calibration.rounding import WeightScheme, round_to_nearest
from headstart.exporter.comparison import all_logits
from headstart.exporter.graph import save_graph
from headstart.exporter.passes.gemm import split_gemms
from headstart.exporter.passes.linear import Linear, is_lm_head, linears
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import OptionError

BundleOf = Callable[[str], Bundle]
Floats = NDArray[np.float32]
INT4 = WeightScheme(4, 32)
LETTERS = "etaoin shrdlu"


def correlated(rows: int, inputs: int) -> Floats:
    """Rows that live near a space of a quarter of the dimensions, as activations do."""
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((rows, inputs // 4)) @ rng.standard_normal((inputs // 4, inputs))
    return (hidden + 0.1 * rng.standard_normal((rows, inputs))).astype(np.float32)


def outliers(rows: int, inputs: int) -> Floats:
    """Rows in which every sixteenth channel is thirty times as large."""
    values = np.random.default_rng(2).standard_normal((rows, inputs)).astype(np.float32)
    values[:, ::16] *= 30
    return values


def statistics_of(values: Floats) -> Statistics:
    width = values.shape[1]
    statistics = Statistics.empty(width)
    statistics.add(values)
    return statistics


def weight_of(inputs: int, outputs: int = 48) -> Floats:
    return np.random.default_rng(3).standard_normal((inputs, outputs)).astype(np.float32)


def output_error(values: Floats, weight: Floats, rounded: Floats) -> float:
    return float(np.square(values @ (weight - rounded)).mean())


@pytest.mark.parametrize("scheme", [WeightScheme(8), INT4, WeightScheme(4, 128)], ids=str)
def test_gptq_errs_less_than_rounding(scheme: WeightScheme) -> None:
    seen, unseen = np.split(correlated(2048, 256), 2)
    weight, statistics = weight_of(256), statistics_of(seen)
    rounded = gptq(weight, statistics.gram / statistics.rows, scheme)
    assert rounded.scales.shape == ((8, 48) if scheme.group == 32 else (2, 48) if scheme.group else (48,))
    assert np.abs(rounded.values).max() <= scheme.largest
    plain = output_error(unseen, weight, round_to_nearest(weight, scheme).dequantized())
    assert output_error(unseen, weight, rounded.dequantized()) < 0.5 * plain


def test_gptq_takes_inputs_that_are_always_zero() -> None:
    values = correlated(512, 64)
    values[:, [0, 40]] = 0
    statistics = statistics_of(values)
    rounded = gptq(weight_of(64), statistics.gram / statistics.rows, INT4).dequantized()
    assert np.isfinite(rounded).all() and not rounded[[0, 40]].any()


def test_awq_scales_protect_outlier_channels() -> None:
    values, weight = outliers(1024, 256), weight_of(256)
    statistics = statistics_of(values)
    scale = best_input_scale(weight, statistics, INT4)[:, None]
    rounded = round_to_nearest(weight * scale, INT4).dequantized() / scale
    plain = output_error(values, weight, round_to_nearest(weight, INT4).dequantized())
    assert output_error(values, weight, rounded) < 0.8 * plain


def test_a_clipped_range_errs_less_than_a_whole_one() -> None:
    values, weight = outliers(1024, 256), weight_of(256)
    statistics = statistics_of(values)
    rounded = round_clipped(weight, statistics.gram / statistics.rows, INT4)
    plain = output_error(values, weight, round_to_nearest(weight, INT4).dequantized())
    assert output_error(values, weight, rounded.dequantized()) < 0.9 * plain


def test_int8_ranges_are_kept_whole() -> None:
    weight = weight_of(64)
    scheme = WeightScheme(8)
    np.testing.assert_array_equal(clipped_scales(weight, np.eye(64), scheme), round_to_nearest(weight, scheme).scales)


def awq_scale(weight: Floats, statistics: Statistics) -> Floats:
    return best_input_scale(weight, statistics, INT4)


def test_smoothing_evens_out_inputs_and_weights() -> None:
    weight, values = weight_of(64), outliers(256, 64)
    statistics = statistics_of(values)
    scale = smooth_input_scale(weight, statistics)
    inputs, weights = statistics.largest / scale, np.abs(weight * scale[:, None]).max(axis=1)
    np.testing.assert_allclose(inputs, weights, rtol=1e-4)  # what α = 1/2 means
    assert np.ptp(np.log(inputs)) < np.ptp(np.log(statistics.largest))


def readers_by_input(model: Any, vocab_size: int) -> dict[str, list[Linear]]:
    """The decoder's linear layers by the name of the value they read."""
    found: dict[str, list[Linear]] = {}
    for linear in linears(model):
        if not is_lm_head(linear, vocab_size):
            found.setdefault(linear.node.inputs[0].name, []).append(linear)
    return found


@pytest.mark.parametrize(
    ("name", "folds"),
    [
        ("llama", 4),  # two norms in each of two layers
        ("qwen2", 4),
        ("gemma3", 4),
        ("gpt_neox", 2),  # LayerNorm, whose bias is folded, too; equal norms of one value are one here
        ("opt", 3),  # its feed-forward layers are Gemm nodes
        ("gpt2", 0),  # a Reshape stands between each norm and what reads it
    ],
)
@pytest.mark.parametrize("scale_of", [awq_scale, smooth_input_scale])
def test_folding_changes_no_logit(bundle_of: BundleOf, tmp_path: Path, name: str, folds: int, scale_of: InputScale) -> None:
    bundle, rng = bundle_of(name), np.random.default_rng(4)
    model, _ = split_gemms(ir.load(bundle.path / DECODER))
    randomize_norms(model, rng)
    before = logits_of(model, bundle, tmp_path / "before")
    folded = []
    for readers in readers_by_input(model, bundle.manifest.model.vocab_size).values():
        width = readers[0].shape[0]
        values = rng.standard_normal((256, width)) * np.exp(2 * rng.standard_normal(width))
        folded.append(scale_inputs(readers, statistics_of(values.astype(np.float32)), scale_of))
    assert sum(folded) == folds
    after = logits_of(model, bundle, tmp_path / "after")
    assert np.abs(after - before).max() / np.ptp(before) < 1e-4


def randomize_norms(model: Any, rng: np.random.Generator) -> None:
    """Norms of a random model are all one and their biases zero: a wrong fold of those would not show."""
    for node in model.graph:
        if node.op_type in ("LayerNormalization", "Mul"):
            for value in node.inputs:
                if value is not None and value.is_initializer() and len(value.shape) == 1:
                    array = value.const_value.numpy() + 0.3 * rng.standard_normal(value.shape[0])
                    value.const_value = ir.tensor(array.astype(np.float32), name=value.name)


def logits_of(model: Any, bundle: Bundle, folder: Path) -> Floats:
    """[T, V] of one text by the bundle with `model` as its decoder."""
    shutil.copytree(bundle.path, folder)
    save_graph(model, folder / DECODER)
    return all_logits(OnnxRuntimeEngine(Bundle.load(folder, check_hashes=False)), np.arange(5, 37))


def test_a_fold_moves_the_statistics_along(bundle_of: BundleOf) -> None:
    bundle = bundle_of("llama")
    feeds = DecoderFeeds(bundle, of_windows(np.random.default_rng(5).integers(3, 300, (2, 64))))
    model = ir.load(bundle.path / DECODER)
    readers = next(iter(readers_by_input(model, 300).values()))
    before = observe(model, readers, feeds)
    (name,) = before
    before[name].magnitude *= np.exp(np.random.default_rng(6).standard_normal(64))  # else nothing is worth a scale
    assert scale_inputs(readers, before[name], awq_scale)
    after = observe(model, readers, feeds)[name]
    np.testing.assert_allclose(after.gram, before[name].gram, rtol=1e-3, atol=1e-3 * np.abs(after.gram).max())


def test_a_weight_that_two_layers_share_is_left_alone(bundle_of: BundleOf) -> None:
    model = ir.load(bundle_of("llama").path / DECODER)
    first, second, third = next(iter(readers_by_input(model, 300).values()))
    third.node.replace_input_with(1, second.weight)
    readers = next(iter(readers_by_input(model, 300).values()))
    before = first.dequantized(), second.dequantized()
    assert not scale_inputs(readers, statistics_of(outliers(256, 64)), awq_scale)
    for kept, linear in zip(before, (first, second), strict=True):
        np.testing.assert_array_equal(kept, linear.dequantized())


def text_file(folder: Path, name: str = "text.txt") -> Path:
    rng = np.random.default_rng(7)
    file = folder / name
    file.write_text("".join(rng.choice(list(LETTERS), 6000)), "utf-8")
    return file


def test_layers_that_read_one_value_share_its_statistics(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = bundle_of("llama")
    model = ir.load(bundle.path / DECODER)
    windows = calibration_windows(bundle, text_file(tmp_path), 1024)
    readers = readers_by_input(model, 300)
    feeds = DecoderFeeds(bundle, of_windows(windows))
    found = observe(model, [linear for group in readers.values() for linear in group], feeds)
    assert list(found) == list(readers) and len(found) == 8  # q, k and v read one; gate and up another
    assert {statistics.rows for statistics in found.values()} == {windows.size}
    for statistics in found.values():
        assert np.linalg.eigvalsh(statistics.gram).min() > -1e-6 * np.trace(statistics.gram)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_every_method_makes_a_bundle_that_decodes(bundle_of: BundleOf, tmp_path: Path, method: str, weights: str) -> None:
    counts: Counter[str] = Counter()
    options = QuantizeOptions(weights=weights, method=method, calibration_tokens=1024)
    source = bundle_of("llama")
    bundle = quantize(
        source.path, tmp_path / "small", options, text_file(tmp_path), progress=lambda what, done, of: counts.update([what])
    )
    assert bundle.manifest.quantization["method"] == method
    assert counts["weights"] == 15 and counts["calibration"] == (0 if method == "rtn" else 2)
    ids = np.arange(5, 37)
    before, after = (all_logits(OnnxRuntimeEngine(b), ids) for b in (source, bundle))
    assert np.abs(before - after).max() / np.ptp(before) < (0.03 if weights == "int8" else 0.3)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_int4_is_nearer_to_float_than_plain_rounding(bundle_of: BundleOf, tmp_path: Path, method: str) -> None:
    source, data = bundle_of("llama"), text_file(tmp_path)
    options = {"weights": "int4", "lm_head": "none", "embedding": "none", "calibration_tokens": 5120}
    found = {}
    for name in ("rtn", method):
        found[name] = quantize(source.path, tmp_path / name, QuantizeOptions(method=name, **options), data)  # type: ignore[arg-type]
    held_out = np.array(calibration_windows(source, data, 6000)[-2:])
    assert divergence(source, found[method], held_out) < divergence(source, found["rtn"], held_out)


def divergence(reference: Bundle, bundle: Bundle, windows: NDArray[np.int64]) -> float:
    """Mean KL per token, nats."""
    engines = [OnnxRuntimeEngine(b) for b in (reference, bundle)]
    total = 0.0
    for ids in windows:
        p, q = (log_softmax(all_logits(engine, ids)) for engine in engines)
        total += float((np.exp(p) * (p - q)).sum(axis=-1).mean())
    return total / len(windows)


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"holds \d+ tokens; at least 512 are needed.*Fix: more text"),
        ("short.txt", b"a few words", r"holds \d+ tokens; at least 512 are needed"),
        ("bytes.txt", b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        ("missing.txt", None, "cannot be read as UTF-8 text"),
        ("lines.jsonl", b'{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        ("list.jsonl", b"[1, 2]\n", 'line 1 has no text under "text" or "prompt"'),
        ("keys.jsonl", b'{"body": "a text under a key that nobody reads"}\n', 'line 1 has no text under "text" or "prompt"'),
    ],
)
def test_data_that_cannot_calibrate(
    bundle_of: BundleOf, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=message) as error:
        quantize(bundle_of("llama").path, tmp_path / "out", QuantizeOptions(method="awq"), tmp_path / name)
    assert name in str(error.value) and "Fix: " in str(error.value)
    assert not (tmp_path / "out").exists()


def test_json_lines_are_joined(bundle_of: BundleOf, tmp_path: Path) -> None:
    text = text_file(tmp_path).read_text("utf-8")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(f'{{"text": "{text[:3000]}"}}\n\n{{"prompt": "{text[3000:]}"}}\n', "utf-8")
    windows = calibration_windows(bundle_of("llama"), lines, 2048)
    assert windows.shape == (2048 // WINDOW, WINDOW)

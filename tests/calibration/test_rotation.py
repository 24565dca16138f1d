"""Rotated graphs compute what they did; rows with a few large channels keep their precision in 8 bits."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from architectures import byte_tokenizer, save_checkpoint
from numpy.typing import NDArray
from realistic import realistic_model

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.calibration.rotation import rotate_layers
from headstart.calibration.verification.reference import Reference, Text
from headstart.calibration.verification.rounding_noise import rounding_noise
from headstart.calibration.verify import verify
from headstart.exporter.build import build
from headstart.exporter.comparison import all_logits
from headstart.exporter.export import export
from headstart.exporter.graph import save_graph
from headstart.exporter.heads.install import import_head
from headstart.exporter.passes.gemm import split_gemms
from headstart.exporter.passes.linear import linears
from headstart.exporter.passes.rotation import block_of, is_rotation, rotation_of
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import OptionError
from headstart.runtime.hadamard import hadamard, rotated_rows
from headstart.runtime.loading import load

BundleOf = Callable[[str], Bundle]
Floats = NDArray[np.float32]
MEDUSA = Path(__file__).parents[2] / "samples/checkpoints/pycode/medusa"


@pytest.mark.parametrize("size", [16, 32])
def test_a_rotation_is_its_own_inverse(size: int) -> None:
    np.testing.assert_allclose(hadamard(size) @ hadamard(size), np.eye(size), atol=1e-6)
    np.testing.assert_array_equal(hadamard(size), hadamard(size).T)
    rows = np.random.default_rng(0).standard_normal((5, 3 * size)).astype(np.float32)
    turned = rotated_rows(rows, size)
    np.testing.assert_allclose(rotated_rows(turned, size), rows, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-5)
    one = np.zeros((1, 3 * size), np.float32)
    one[0, size] = 8
    assert np.abs(rotated_rows(one, size)).max() == pytest.approx(8 / size**0.5)  # spread over its block


def test_blocks_divide_the_width() -> None:
    assert [block_of(width) for width in (640, 2048, 416, 48, 8, 100)] == [32, 32, 32, 16, 0, 0]


@pytest.fixture(scope="module")
def realistic(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    made: dict[str, Bundle] = {}

    def of(name: str) -> Bundle:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            save_checkpoint(realistic_model(name), folder / "checkpoint")
            made[name] = export(folder / "checkpoint", folder / "bundle")
        return made[name]

    return of


def rotated(bundle: Bundle, folder: Path) -> tuple[Bundle, dict[str, Any]]:
    """The float bundle with its graphs rotated."""
    shutil.copytree(bundle.path, folder)
    vocab, graphs = bundle.manifest.model.vocab_size, bundle.manifest.graphs
    models = {
        name: split_gemms(ir.load(bundle.path / graphs[name].file))[0] for name in ("decoder", "encoder") if name in graphs
    }
    tables = rotate_layers(models["decoder"], vocab, lm_head=True)
    if "encoder" in models:
        rotate_layers(models["encoder"], vocab, True, tables)
    for name, model in models.items():
        save_graph(model, folder / graphs[name].file)
    return Bundle.load(folder, check_hashes=False), models


def source_of(bundle: Bundle) -> Any:
    rng, info = np.random.default_rng(3), bundle.manifest.graphs.get("encoder")
    if info is None:
        return None
    if bundle.manifest.model.source == "text":
        return rng.integers(3, 90, 23)
    shape = [size if isinstance(size, int) else 64 for size in info.inputs[0].shape[1:]]
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma2", "opt", "t5", "bart", "whisper"])
def test_a_rotated_model_computes_the_same(bundle_of: BundleOf, tmp_path: Path, name: str) -> None:
    bundle = bundle_of(name)
    turned, models = rotated(bundle, tmp_path / "rotated")
    ids, source = np.arange(5, 25), source_of(bundle)
    before, after = (all_logits(OnnxRuntimeEngine(one), ids, source) for one in (bundle, turned))
    assert np.abs(before - after).max() < 1e-4 * np.ptp(before)
    for model in models.values():
        assert all(rotation_of(linear.source) or block_of(linear.shape[0]) for linear in linears(model))
        assert any(rotation_of(linear.source) for linear in linears(model))


@pytest.mark.parametrize(("name", "folded"), [("gemma3", 2), ("qwen2", 1), ("t5", 1)])
def test_real_head_sizes_rotate_values_where_they_are_computed(
    realistic: Callable[[str], Bundle], tmp_path: Path, name: str, folded: int
) -> None:
    """Head sizes 256, 128 with biases, and 64: what follows an attention's own values needs no rotation."""
    turned, models = rotated(realistic(name), tmp_path / "rotated")
    ids, source = np.arange(5, 45), source_of(turned)
    before, after = (all_logits(OnnxRuntimeEngine(one), ids, source) for one in (realistic(name), turned))
    assert np.abs(before - after).max() < 1e-3 * np.ptp(before)
    plain = [linear.name for linear in linears(models["decoder"]) if not rotation_of(linear.source)]
    assert len(plain) == folded and all("o_proj" in one or "SelfAttention.o" in one for one in plain)


def test_layers_that_read_one_value_share_its_rotation(bundle_of: BundleOf, tmp_path: Path) -> None:
    model = rotated(bundle_of("llama_tied"), tmp_path / "rotated")[1]["decoder"]
    sources = {id(linear.source) for linear in linears(model)}
    rotations = [node for node in model.graph if node.op_type == "MatMul" and is_rotation(node.inputs[1])]
    assert len(rotations) == len(sources) + 1  # and what is looked up in the tied table, rotated back


def outlying(folder: Path) -> Bundle:
    """A Gemma 3 whose norms give a few channels a hundred times the others' size, as Gemma 3 270M's do."""
    model = realistic_model("gemma3")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "input_layernorm" in name or "pre_feedforward" in name or name.endswith("model.norm.weight"):
                parameter[torch.arange(7, 640, 160)] += 100
    save_checkpoint(model, folder / "checkpoint")
    return export(folder / "checkpoint", folder / "bundle")


def test_large_channels_cost_no_precision(tmp_path: Path) -> None:
    bundle = outlying(tmp_path)
    ids = np.array(byte_tokenizer(5000)("what a few channels hold, the others cannot")["input_ids"])
    wanted = all_logits(OnnxRuntimeEngine(bundle), ids)
    errors = {}
    for rotation in (False, True):
        made = quantize(bundle.path, tmp_path / str(rotation), QuantizeOptions(rotation=rotation))
        build(made.path)
        found = all_logits(load(made.path).engine, ids)
        errors[rotation] = float(np.sqrt(np.mean((found - wanted) ** 2)) / np.std(wanted))
    assert errors[True] < errors[False] / 3
    noise = {
        rotation: rounding_noise(Reference.open(Bundle.load(tmp_path / str(rotation))), [Text(tuple(ids))])
        for rotation in errors
    }
    assert noise[True].median < noise[False].median / 3
    report = verify(tmp_path / "True", ["what a few channels hold"], 8, samples=0)
    assert report.ok, report


def test_heads_read_a_rotated_lm_head(pycode: Bundle, tmp_path: Path) -> None:
    """Those that were there when it was quantized, and one that is added afterwards."""
    bundle = quantize(pycode.path, tmp_path / "small", QuantizeOptions(heads="none"))
    assert bundle.head("medusa").shared["lm_head"].rotation == 32
    import_head(bundle.path, MEDUSA, "later")
    hidden = np.random.default_rng(0).standard_normal((1, 1, bundle.manifest.model.hidden_size)).astype(np.float32)
    wanted = OnnxRuntimeEngine(pycode).graph("heads/medusa").run({"hidden": hidden})
    engine = OnnxRuntimeEngine(Bundle.load(bundle.path))
    for name in ("medusa", "later"):
        found = engine.graph(f"heads/{name}").run({"hidden": hidden})
        np.testing.assert_allclose(found["topk_log_probs"], wanted["topk_log_probs"], atol=0.1)
        assert (found["topk_ids"][..., 0] == wanted["topk_ids"][..., 0]).mean() >= 0.75


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_channels_are_evened_out_once(method: str) -> None:
    assert not QuantizeOptions(method=method).rotates and QuantizeOptions(method="gptq").rotates
    with pytest.raises(OptionError, match=rf"--rotation and --method {method} both .* Fix: --method rtn or gptq"):
        QuantizeOptions(method=method, rotation=True)

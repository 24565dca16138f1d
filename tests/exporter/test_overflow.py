"""Models whose numbers outgrow float16: found when they are exported, kept in float32 where it matters, and built so."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from architectures import save_checkpoint, tiny_model
from tensorrt_steps import FLOAT16_NOISE, SLOTS, decoder, run

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.build import build
from headstart.exporter.export import export
from headstart.exporter.lowering.tensorrt import lower
from headstart.exporter.overflow import LARGEST, overflowing, watch
from headstart.exporter.tensorrt.options import TensorRtOptions
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import EngineError

BundleOf = Callable[[str], Bundle]
SIZES = {"batch": 1, "slots": SLOTS}
LOUD = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A Llama whose first feed-forward layer writes numbers of about a million into the residual stream."""
    folder = tmp_path_factory.mktemp("loud")
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data *= 1e6
    return export(save_checkpoint(model, folder / "checkpoint"), folder / "bundle")


def test_exporting_finds_what_overflows(loud: Bundle, bundle_of: BundleOf) -> None:
    assert loud.manifest.overflows["decoder"]
    assert bundle_of("llama").manifest.overflows == {"decoder": ()}
    assert bundle_of("t5").manifest.overflows == {"decoder": (), "encoder": ()}


def test_the_largest_of_each_value_is_told(tmp_path: Path, loud: Bundle) -> None:
    """Against numpy, on a graph of two nodes."""
    source = ir.val("x", ir.DataType.FLOAT, (2, 2))
    square = ir.node("Mul", [source, source], name="square")
    total = ir.node("ReduceSum", square.outputs, name="total", attributes={"keepdims": 0})
    for node, name in ((square, "squares"), (total, "sum")):
        node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
    graph = ir.Graph([source], list(total.outputs), nodes=[square, total], opset_imports={"": 24}, name="g")
    model = ir.Model(graph, ir_version=11)
    assert watch(model) == ["squares", "sum"]
    ir.save(model, tmp_path / "watched.onnx")
    import onnxruntime as ort

    session = ort.InferenceSession(str(tmp_path / "watched.onnx"), providers=["CPUExecutionProvider"])
    assert session.run([LARGEST], {"x": np.array([[1, -3], [2, 0]], np.float32)})[0].tolist() == [9.0, 14.0]


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_layers_that_overflow_stay_float32(loud: Bundle, tmp_path: Path, weights: str) -> None:
    """And no other linear layer does; without this, the logits are no numbers."""
    bundle = loud if weights == "float32" else quantize(loud.path, tmp_path / weights, QuantizeOptions(weights=weights))
    wanted = run(decoder(bundle), bundle, tmp_path / "canonical.onnx")
    found = bundle.manifest.overflows["decoder"]
    lowered = lower(decoder(bundle), "float16", SIZES, overflowing=found)
    assert lowered.float32_layers == (LOUD,)
    stored = lowered.weight_bytes
    assert stored["float32"] < stored.get("int8", stored["float16"])
    for ours, theirs in zip(run(lowered.model, bundle, tmp_path / "lowered.onnx"), wanted, strict=True):
        assert np.abs(ours - theirs).max() < FLOAT16_NOISE * np.ptp(theirs)
    spoiled = lower(decoder(bundle), "float16", SIZES).model
    assert not np.isfinite(run(spoiled, bundle, tmp_path / "spoiled.onnx")[0]).all()


def test_wider_types_need_none_of_it(loud: Bundle) -> None:
    assert lower(decoder(loud), "bfloat16", SIZES, overflowing=loud.manifest.overflows["decoder"]).float32_layers == ()


def test_attention_cannot_stay_float32(bundle_of: BundleOf) -> None:
    model = decoder(bundle_of("llama"))
    attended = next(node for node in model.graph if node.op_type == "Attention").outputs[0].name
    with pytest.raises(EngineError, match=r"half precision only\. Fix: --precision bfloat16"):
        lower(model, "float16", SIZES, overflowing=[attended])


def test_the_engine_says_which_layers(loud: Bundle) -> None:
    """Really built, for one profile's worth of rows; a bundle that was exported without looking is looked at now."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")
    info = build(loud.path, "trt-rtx:sm86", options=TensorRtOptions(cache=64, prefill_rows=64))
    plan = info.plans["decoder"]
    assert plan.float32_layers == (LOUD,) and plan.layers["matrix_multiply float32"] >= 1
    assert len(plan.in_place) == 4
    unseen = dataclasses.replace(loud.manifest, overflows={})
    assert overflowing(loud.path, unseen) == loud.manifest.overflows

"""The TensorRT recipe, run by ONNX Runtime: its graphs are standard ONNX, so what it promises can be checked with no GPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from architectures import ARCHITECTURES
from tensorrt_steps import FLOAT16_NOISE, SLOTS, decoder, run

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.lowering.tensorrt import lower
from headstart.exporter.passes.half import in_range
from headstart.runtime.bundle import Bundle

BundleOf = Callable[[str], Bundle]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_half_precision_stays_near_the_canonical_graph(bundle_of: BundleOf, name: str, tmp_path: Path) -> None:
    bundle = bundle_of(name)
    wanted = run(decoder(bundle), bundle, tmp_path / "canonical.onnx")
    lowered = lower(decoder(bundle), "float16", {"batch": 1, "slots": SLOTS})
    found = run(lowered.model, bundle, tmp_path / "lowered.onnx")
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(ours - theirs).max() < FLOAT16_NOISE * np.ptp(theirs)
    layers = bundle.manifest.model.layers
    assert lowered.passes["attention_layers"] + lowered.passes["written_out_attention_layers"] == layers
    assert lowered.passes["cache_updates"] == 2 * layers


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_stay_quantized(bundle_of: BundleOf, weights: str, tmp_path: Path) -> None:
    bundle = quantize(bundle_of("llama_tied").path, tmp_path / weights, QuantizeOptions(weights=weights))
    wanted = run(decoder(bundle), bundle, tmp_path / "canonical.onnx")
    lowered = lower(decoder(bundle), "float16", {"batch": 1, "slots": SLOTS})
    found = run(lowered.model, bundle, tmp_path / "lowered.onnx")
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(ours - theirs).max() < FLOAT16_NOISE * np.ptp(theirs)
    stored = lowered.weight_bytes
    assert stored[weights] > 4 * stored["float16"]
    values = [node.inputs[0] for node in lowered.model.graph if node.op_type == "DequantizeLinear"]
    assert all(value.is_initializer() and value.dtype.name in ("INT8", "INT4") for value in values)


def test_every_value_has_the_type_it_is_used_as(bundle_of: BundleOf) -> None:
    model = lower(decoder(bundle_of("gemma3")), "bfloat16", {"batch": 1, "slots": SLOTS}).model
    floats = {ir.DataType.FLOAT, ir.DataType.BFLOAT16}
    for node in model.graph:
        types = {value.dtype for value in node.inputs if value is not None and value.dtype in floats}
        assert len(types) < 2 or node.op_type == "Cast", f"{node.name} mixes {types}"
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType.BFLOAT16}


def test_positions_and_angles_stay_in_float32(bundle_of: BundleOf) -> None:
    """Position 2049 has no float16 of its own: two rows there would turn by one angle."""
    model = lower(decoder(bundle_of("llama")), "float16", {"batch": 1, "slots": SLOTS}).model
    angles = [node for node in model.graph if node.op_type in ("Cos", "Sin")]
    assert angles and all(node.outputs[0].dtype == ir.DataType.FLOAT for node in angles)


def test_a_mask_beyond_the_range_becomes_its_last_number() -> None:
    lowest = np.array([np.finfo(np.float32).min, 1.0], np.float32)
    assert in_range(lowest, ir.DataType.FLOAT16).tolist() == [-65504.0, 1.0]


def test_grouped_heads_are_folded_and_masks_added_once(bundle_of: BundleOf) -> None:
    model = lower(decoder(bundle_of("llama")), "float16", {"batch": 1, "slots": SLOTS}).model
    attention = [node for node in model.graph if node.op_type == "Attention"]
    assert len(attention) == 2 and len({id(node.inputs[3]) for node in attention}) == 1
    assert attention[0].inputs[3].dtype == ir.DataType.FLOAT16
    assert sum(node.op_type == "Where" for node in model.graph) == 1


def test_unit_scales_are_avoided(bundle_of: BundleOf) -> None:
    model = lower(decoder(bundle_of("opt")), "float16", {"batch": 1, "slots": SLOTS}).model
    assert {float(node.attributes["scale"].value) for node in model.graph if node.op_type == "Attention"} == {0.5}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_written_out_where_the_builder_has_no_such_layers(bundle_of: BundleOf, name: str, tmp_path: Path) -> None:
    """For JetPack 6: nothing that came with ONNX's later opsets, and the same logits."""
    bundle = bundle_of(name)
    wanted = run(decoder(bundle), bundle, tmp_path / "canonical.onnx")
    lowered = lower(decoder(bundle), "float16", {"batch": 1, "slots": SLOTS}, native=False)
    kinds = {node.op_type for node in lowered.model.graph}
    assert not kinds & {"Attention", "TensorScatter", "RMSNormalization", "RotaryEmbedding", "Swish"}
    assert lowered.model.graph.opset_imports[""] == 21
    assert lowered.passes["written_out_attention_layers"] == 2
    found = run(lowered.model, bundle, tmp_path / "lowered.onnx")
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(ours - theirs).max() < FLOAT16_NOISE * np.ptp(theirs)

"""The TensorRT recipe, run by ONNX Runtime: its graphs are standard ONNX, so what it promises can be checked with no GPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from architectures import ARCHITECTURES
from tensorrt_steps import FLOAT16_NOISE, SLOTS, decoder, run

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.graph import save_graph
from headstart.exporter.lowering.tensorrt import lower
from headstart.exporter.passes.best_tokens import add_best_tokens
from headstart.exporter.passes.half import in_range
from headstart.exporter.passes.row_mask import mask_from_rows
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.ort_session import open_session

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
    assert lowered.passes["attention_layers"] + lowered.passes["decomposed_attention_layers"] == layers
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
    assert {value.dtype for value in model.graph.outputs if value.name != contract.BEST_IDS} == {ir.DataType.BFLOAT16}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_the_computed_mask_is_the_canonical_one(bundle_of: BundleOf, name: str, tmp_path: Path) -> None:
    """To the last bit of a float32 graph, behind a prompt and in a tree; sliding windows cut theirs out of it."""
    bundle = bundle_of(name)
    wanted = run(decoder(bundle), bundle, tmp_path / "canonical.onnx")
    model, changed = mask_from_rows(decoder(bundle), SLOTS)
    assert changed and {value.name for value in model.graph.inputs} & {"attention_mask", "row_mask"} == {"row_mask"}
    for ours, theirs in zip(run(model, bundle, tmp_path / "rows.onnx"), wanted, strict=True):
        assert (ours == theirs).all()


def test_sequences_see_behind_their_own_histories(tmp_path: Path) -> None:
    """[B, T, T] and write_index alone, against numpy: three sequences of unequal length, with random trees."""
    ends = {"attention_mask": (ir.DataType.BOOL, ("B", 1, "T", 12)), "write_index": (ir.DataType.INT64, ("B",))}
    inputs = {name: ir.val(name, dtype, shape) for name, (dtype, shape) in ends.items()}
    logits = ir.node("Cast", [inputs["attention_mask"]], attributes={"to": int(ir.DataType.FLOAT16)})
    logits.outputs[0].name, logits.outputs[0].dtype = contract.LOGITS, ir.DataType.FLOAT16
    graph = ir.Graph(list(inputs.values()), logits.outputs, nodes=[logits], opset_imports={"": 24}, name="mask")
    model, _ = mask_from_rows(ir.Model(graph, ir_version=11), 12)
    save_graph(model, tmp_path / "mask.onnx")
    generator, starts = np.random.default_rng(0), np.array([0, 3, 9])
    rows = generator.random((3, 3, 3)) < 0.5
    wanted = np.arange(12)[None, None].repeat(3, 1) < starts[:, None, None]
    for mask, start, own in zip(wanted, starts, rows, strict=True):
        mask[:, start : start + 3] = own
    found = open_session(tmp_path / "mask.onnx", 1).run(None, {"row_mask": rows, "write_index": starts})[0]
    assert (found[:, 0] == wanted).all()


def test_the_best_token_is_the_lowest_of_equals(tmp_path: Path) -> None:
    """As numpy's argmax says; and a row of no numbers names a token that exists."""
    logits = np.array([[[1, 3, 3, 2], [5, 5, 5, 5]], [[0, 0, 0, 1], [-7, -6, -9, -6]]], np.float16)
    source = ir.val(contract.LOGITS, ir.DataType.FLOAT16, (2, 2, 4))
    node = ir.node("Identity", [ir.val("raw", ir.DataType.FLOAT16, (2, 2, 4))], outputs=[source])
    graph = ir.Graph([node.inputs[0]], [source], nodes=[node], opset_imports={"": 24}, name="best")
    model, _ = add_best_tokens(ir.Model(graph, ir_version=11))
    save_graph(model, tmp_path / "best.onnx")
    session = open_session(tmp_path / "best.onnx", 1)
    assert (session.run([contract.BEST_IDS], {"raw": logits})[0] == logits.argmax(-1)).all()
    assert session.run([contract.BEST_IDS], {"raw": np.full_like(logits, np.nan)})[0].max() < 4


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
    assert sum(node.op_type == "Where" for node in model.graph) == 2, "the mask's, and the best token's"


def test_unit_scales_are_avoided(bundle_of: BundleOf) -> None:
    model = lower(decoder(bundle_of("opt")), "float16", {"batch": 1, "slots": SLOTS}).model
    assert {float(node.attributes["scale"].value) for node in model.graph if node.op_type == "Attention"} == {0.5}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_decomposed_where_the_builder_has_no_such_layers(bundle_of: BundleOf, name: str, tmp_path: Path) -> None:
    """For JetPack 6: nothing that came with ONNX's later opsets, and the same logits."""
    bundle = bundle_of(name)
    wanted = run(decoder(bundle), bundle, tmp_path / "canonical.onnx")
    lowered = lower(decoder(bundle), "float16", {"batch": 1, "slots": SLOTS}, native=False)
    kinds = {node.op_type for node in lowered.model.graph}
    assert not kinds & {"Attention", "TensorScatter", "RMSNormalization", "RotaryEmbedding", "Swish"}
    assert lowered.model.graph.opset_imports[""] == 21
    assert lowered.passes["decomposed_attention_layers"] == 2
    found = run(lowered.model, bundle, tmp_path / "lowered.onnx")
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(ours - theirs).max() < FLOAT16_NOISE * np.ptp(theirs)


def test_what_is_decomposed_is_named(bundle_of: BundleOf, tmp_path: Path) -> None:
    """Of an encoder-decoder each attention on its own; Whisper's encoder has no mask, and gives the same states."""
    bundle, sizes = bundle_of("whisper"), {"batch": 1, "slots": SLOTS, "source": 60}
    graphs = {name: bundle.path / graph.file for name, graph in bundle.manifest.graphs.items()}
    assert lower(ir.load(graphs["decoder"]), "float16", sizes).decomposed_attention == ()
    named = lower(ir.load(graphs["decoder"]), "float16", sizes, native=False).decomposed_attention
    assert named == tuple(f"{kind} {layer}" for kind in ("self-attention", "cross-attention") for layer in range(2))
    source = np.random.default_rng(0).standard_normal(bundle.manifest.graphs["encoder"].inputs[0].shape[1:]).astype(np.float16)
    states = []
    for native in (True, False):
        lowered = lower(ir.load(graphs["encoder"]), "float16", sizes, native)
        assert lowered.decomposed_attention == (() if native else ("attention 0",))
        save_graph(lowered.model, tmp_path / "encoder.onnx")
        states.append(open_session(tmp_path / "encoder.onnx", 1).run(None, {contract.INPUT_FEATURES: source[None]})[0])
    assert np.abs(states[0] - states[1]).max() < FLOAT16_NOISE * np.ptp(states[0])

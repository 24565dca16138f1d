"""The CPU lowering against the canonical graph, for every architecture; and what each pass promises."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from architectures import ARCHITECTURES, save_checkpoint, tiny_model

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.build import build
from headstart.exporter.export import export
from headstart.exporter.passes.grouped_query_attention import fuse_attention
from headstart.exporter.passes.linear import linears
from headstart.exporter.passes.normalization import fuse_normalization
from headstart.exporter.passes.packed_linears import pack_linears
from headstart.runtime.bundle import Bundle
from headstart.runtime.contract import LOGITS
from headstart.runtime.engines.info import ENGINE_FILE, engine_folder
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import BundleError, EngineError, OptionError, OutputError
from headstart.runtime.loading import load
from headstart.runtime.prefill import last_logits, prefill, run_decoder

BundleOf = Callable[[str], Bundle]
# Soft caps are spelled out in the canonical graph: those layers keep the portable form.
PORTABLE = {"gemma2": 2}
# The rotary table's width must be a multiple of 8; these turn 4 of 16 values, and keep the rotary embedding outside.
ROTARY_OUTSIDE = {"gpt_neox", "stablelm", "cohere"}


def canonical(bundle: Bundle) -> ir.Model:
    return ir.load(bundle.path / bundle.manifest.graphs["decoder"].file)


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def portable_layers(model: ir.Model) -> int:
    """How many cached attention layers are left in the portable form."""
    scatters = [node for node in model.graph if node.op_type == "TensorScatter" and node.inputs[0].is_graph_input()]
    return len(scatters) // 2


@pytest.fixture(scope="module")
def built(bundle_of: BundleOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    """(architecture, float32 | int8 | int4) -> a bundle built for the CPU, compared with the canonical graph by that."""
    folder = tmp_path_factory.mktemp("built")

    def make(name: str, weights: str) -> Bundle:
        target = folder / f"{name}-{weights}"
        if not target.exists():
            if weights == "float32":
                import shutil

                shutil.copytree(bundle_of(name).path, target)
            else:
                quantize(bundle_of(name).path, target, QuantizeOptions(weights=weights))
            build(target)
        return Bundle.load(target)

    return make


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float_lowering_equals_the_canonical_graph(built: Callable[[str, str], Bundle], name: str) -> None:
    bundle = built(name, "float32")
    info = json.loads((engine_folder(bundle, "cpu") / ENGINE_FILE).read_text())
    assert info["relative_difference"] < 2e-6
    assert info["passes"]["fused_attention_layers"] == 2 - PORTABLE.get(name, 0)
    assert info["passes"]["fused_norms"] >= 3


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "gpt2", "gemma3", "phi3", "opt"])
def test_integer_lowering_stays_near_the_canonical_graph(built: Callable[[str, str], Bundle], name: str) -> None:
    bundle = built(name, "int8")
    info = json.loads((engine_folder(bundle, "cpu") / ENGINE_FILE).read_text())
    assert info["passes"]["integer_products"] > 0
    assert 1e-6 < info["relative_difference"] < 0.05


def test_int4_is_widened(built: Callable[[str, str], Bundle]) -> None:
    bundle = built("llama", "int4")
    info = json.loads((engine_folder(bundle, "cpu") / ENGINE_FILE).read_text())
    assert info["relative_difference"] < 0.05
    assert "MatMulNBits" not in kinds(ir.load(engine_folder(bundle, "cpu") / "decoder.onnx"))


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_chain_rows_are_bit_equal_to_single_steps(built: Callable[[str, str], Bundle], weights: str) -> None:
    engine = OnnxRuntimeEngine.open(built("llama", weights))
    prompt, chain = list(range(5, 25)), list(range(30, 61))
    stepwise = engine.graph("decoder").new_state(1, 128)
    prefill(engine, stepwise, prompt)
    singles = [last_logits(prefill(engine, stepwise, [token])) for token in chain]
    at_once = engine.graph("decoder").new_state(1, 128)
    prefill(engine, at_once, prompt)
    rows = np.arange(len(chain))[None]
    output = run_decoder(engine, at_once, np.array([chain]), len(prompt) + rows, np.tri(len(chain), dtype=np.bool_)[None], rows)
    assert (output[LOGITS][0] == np.stack(singles)).all()


def test_rows_beside_a_row_do_not_change_it(built: Callable[[str, str], Bundle]) -> None:
    """One scale per row: an outlier in another row must not reach this one."""
    engine = OnnxRuntimeEngine.open(built("llama", "int8"))
    results = []
    for other in (7, 250):
        cache = engine.graph("decoder").new_state(1, 32)
        positions, mask = np.array([[0, 0]]), np.eye(2, dtype=np.bool_)[None]  # two roots that do not see each other
        ids = np.array([[5, other]])
        results.append(run_decoder(engine, cache, ids, positions, mask, np.array([[0, 1]]))[LOGITS][0].copy())
    assert (results[0][0] == results[1][0]).all()
    assert (results[0][1] != results[1][1]).any()


def test_a_batch_equals_single_runs(built: Callable[[str, str], Bundle]) -> None:
    model = load(built("llama", "float32").path)  # the two forms of attention round alike, to the last bit but one
    prompts = ["abc", "hello there", "x"]
    together = [r.token_ids for r in model.generate(prompts, max_new_tokens=12, ignore_end=True)]
    alone = [model.generate(p, max_new_tokens=12, ignore_end=True).token_ids for p in prompts]
    assert together == alone


def test_packing_joins_layers_of_one_input_and_their_biases(bundle_of: BundleOf) -> None:
    model = canonical(bundle_of("qwen2"))  # query, key and value have biases
    before = len(list(linears(model)))
    model, changed = pack_linears(model)
    names = [linear.name for linear in linears(model)]
    assert changed and len(names) == before - 2 * (2 + 1)
    assert "model.layers.0.self_attn.q_proj.weight+k_proj+v_proj" in names
    assert kinds(model).count("Add") < kinds(canonical(bundle_of("qwen2"))).count("Add")


def test_attention_takes_packed_input_and_its_own_rotary(bundle_of: BundleOf) -> None:
    model = canonical(bundle_of("llama"))
    model, _ = pack_linears(fuse_normalization(model)[0])
    model, changed = fuse_attention(model, 256)
    attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert changed and len(attention) == 2 and portable_layers(model) == 0
    assert all(node.inputs[1] is None and node.attributes["do_rotary"].value == 1 for node in attention)
    assert not {"Cos", "Sin", "Neg", "TensorScatter", "Attention"} & set(kinds(model))


@pytest.mark.parametrize("name", sorted(ROTARY_OUTSIDE))
def test_rotary_stays_outside_where_the_operator_cannot(bundle_of: BundleOf, name: str) -> None:
    model, _ = fuse_attention(canonical(bundle_of(name)), 256)
    attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert attention and all(node.attributes["do_rotary"].value == 0 for node in attention)


def test_building_twice_needs_force(built: Callable[[str, str], Bundle]) -> None:
    bundle = built("llama", "float32")
    with pytest.raises(OutputError, match="exists and is not overwritten"):
        build(bundle.path)
    build(bundle.path, force=True)


def test_unknown_device_and_half_precision(bundle_of: BundleOf, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="device 'tpu' is unknown"):
        build(bundle_of("llama").path, "tpu")
    save_checkpoint(tiny_model("llama"), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "half", dtype="float16")
    with pytest.raises(EngineError, match="--dtype float32"):
        build(tmp_path / "half")
    assert not (tmp_path / "half" / "engines").exists() or not any((tmp_path / "half" / "engines").iterdir())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"source": {"graphs/decoder.onnx": "0" * 64}}, "built from another graphs/decoder.onnx"),
        ({"device": "cuda"}, "built for the device cuda, not cpu"),
        ({"schema_version": 99}, "schema version 99"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused(
    built: Callable[[str, str], Bundle], edit: dict[str, object], message: str
) -> None:
    bundle = built("qwen2", "float32")
    file = engine_folder(bundle, "cpu") / ENGINE_FILE
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | edit))
    try:
        with pytest.raises(EngineError, match=message):
            load(bundle.path)
    finally:
        file.write_text(before)


def test_loading_hashes_what_it_reads_and_nothing_else(built: Callable[[str, str], Bundle], tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(built("qwen2", "float32").path, copy)
    (copy / "graphs/decoder.onnx.data").unlink()  # the engine stands in for the canonical graph
    load(copy)
    weights = copy / "engines/cpu/decoder.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data was changed.*headstart build"):
        load(copy)

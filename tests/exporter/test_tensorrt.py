"""Engines that TensorRT for RTX really builds, with no GPU: what the plans say of themselves is held to the manifest."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from random_head import add_random_head

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.build import build
from headstart.exporter.graph import save_graph
from headstart.exporter.lowering.tensorrt import lower
from headstart.exporter.memory_plan import memory_plan
from headstart.exporter.tensorrt.builder import build_plan, error_log, parse, type_name
from headstart.exporter.tensorrt.library import Library, open_library, parse_target
from headstart.exporter.tensorrt.options import BuilderOptions, TensorRtOptions
from headstart.exporter.tensorrt.origin import source_module
from headstart.exporter.tensorrt.plan import read_plan
from headstart.exporter.tensorrt.profiles import VERIFY_ROWS, decoder_profiles
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.documents import from_json
from headstart.runtime.engines.info import ENGINE_FILE, EngineInfo, Profile, built_engine, engine_folder
from headstart.runtime.errors import EngineError, HeadstartError, MissingExtraError, OptionError, OutputError
from headstart.runtime.graph import MAX_ROWS
from headstart.screen import describe_plan

pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")
BundleOf = Callable[[str], Bundle]
Built = Callable[..., tuple[Bundle, EngineInfo]]
TOKENS = 64
SLOTS = TOKENS + MAX_ROWS
OPTIONS = TensorRtOptions(cache=TOKENS, prefill_rows=64, source=48)


@pytest.fixture(scope="module")
def built(bundle_of: BundleOf, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """(architecture, float32 | int8 | int4, device) -> the bundle, with a head, and its engine; each built once."""
    folder = tmp_path_factory.mktemp("tensorrt")
    infos: dict[tuple[str, str, str], tuple[Bundle, EngineInfo]] = {}

    def make(name: str = "llama", weights: str = "float32", device: str = "trt-rtx:sm86") -> tuple[Bundle, EngineInfo]:
        key = (name, weights, device)
        if key not in infos:
            target = folder / f"{name}-{weights}"
            if not target.exists():
                source = folder / f"{name}-with-head"
                if not source.exists():
                    shutil.copytree(bundle_of(name).path, source)
                    if name == "llama":
                        add_random_head(source, folder / "head")
                if weights == "float32":
                    shutil.copytree(source, target)
                else:
                    quantize(source, target, QuantizeOptions(weights=weights))
            infos[key] = Bundle.load(target), build(target, device, options=OPTIONS)
        return infos[key]

    return make


CASES = [("float32", "trt-rtx:sm86"), ("int8", "trt-rtx:sm89"), ("int4", "trt-rtx:sm120")]


@pytest.mark.parametrize(("weights", "device"), CASES)
def test_caches_are_updated_in_place_and_attention_is_fused(built: Built, weights: str, device: str) -> None:
    bundle, info = built("llama", weights, device)
    plan, layers = info.plans["decoder"], bundle.manifest.model.layers
    assert plan.layers["kv_cache_update float16"] == 2 * layers
    assert plan.layers["attention_output float16"] == layers
    assert plan.kernels["fused_attention"] == layers * len(plan.profiles)
    assert set(plan.in_place) == {
        contract.updated(name) for slots in bundle.manifest.graphs["decoder"].slots for name in slots.sizes()
    }


@pytest.mark.parametrize(("weights", "device"), CASES)
def test_the_plan_s_tensors_are_the_manifest_s(built: Built, weights: str, device: str) -> None:
    """Names, types and sizes as the compiled plan states them: half precision, and a cache of the chosen capacity."""
    bundle, info = built("llama", weights, device)
    text = read_plan((engine_folder(bundle, device) / info.graphs["decoder"]).read_bytes())
    model, kinds = bundle.manifest.model, {"row_mask": "bool", "best_ids": "int32", "logits": "half", "hidden": "half"}
    inputs = {*contract.STEP_INPUTS} - {contract.ATTENTION_MASK} | {contract.ROW_MASK}
    outputs = {contract.LOGITS, contract.HIDDEN, contract.BEST_IDS}
    for name in inputs | outputs:
        assert text.tensors[f"{name}.1"][0] == kinds.get(name, "int64"), name
    assert text.tensors["logits.1"][1][-1] == str(model.vocab_size)
    for cache in bundle.manifest.graphs["decoder"].slots:
        found = text.tensors[f"{contract.updated(cache.key_name)}.1"]
        assert found == ("half", ("1", str(cache.kv_heads), str(SLOTS), str(cache.key_size)))
    assert inputs <= text.inputs and outputs <= text.outputs


def network_ends(library: Library, file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(type, shape) of each input and output as the library's parser sees them; -1 is an open axis."""
    trt = library.module
    log = error_log(trt)
    network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse(trt, network, file, log, lambda node: node)
    ends = [network.get_input(i) for i in range(network.num_inputs)]
    ends += [network.get_output(i) for i in range(network.num_outputs)]
    return {tensor.name: (type_name(tensor.dtype), tuple(tensor.shape)) for tensor in ends}


def test_the_network_has_the_manifest_s_ends(bundle_of: BundleOf, tmp_path: Path) -> None:
    """What the parser makes of the lowered graph: every input and output of the contract, open axes left to the profiles.

    But for the mask, which is computed from the rows, and the best tokens beside the logits.
    """
    bundle = bundle_of("llama")
    graph = bundle.manifest.graphs["decoder"]
    lowered = lower(ir.load(bundle.path / graph.file), "float16", {"batch": 1, "slots": SLOTS})
    save_graph(lowered.model, tmp_path / "decoder.onnx")
    ends = network_ends(open_library(parse_target("trt-rtx:sm86")), tmp_path / "decoder.onnx")
    assert ends.pop(contract.ROW_MASK) == ("bool", (1, -1, -1)) and ends.pop(contract.BEST_IDS) == ("int32", (1, -1))
    kept = [tensor for tensor in (*graph.inputs, *graph.outputs) if tensor.name != contract.ATTENTION_MASK]
    assert set(ends) == {tensor.name for tensor in kept}
    sizes: dict[int | str, int] = {"batch": 1, "slots": SLOTS}
    for tensor in kept:
        kind, shape = ends[tensor.name]
        assert kind == {"float32": "float16"}.get(tensor.dtype, tensor.dtype)
        assert shape == tuple(axis if isinstance(axis, int) else sizes.get(axis, -1) for axis in tensor.shape)


def test_weights_take_the_bits_they_were_given(built: Built) -> None:
    """Linear layers alone: beside them the tiny models are all norms and scales."""
    stored = {weights: built("llama", weights, device)[1].plans["decoder"].weight_bytes for weights, device in CASES}
    assert stored["int8"]["int8"] <= 0.55 * stored["float32"]["half"]
    matrices = stored["int8"]["int8"] - stored["int4"]["int8"]  # what int4 took over from int8
    assert stored["int4"]["int4"] == matrices / 2
    assert stored["float32"]["half"] > 2 * matrices and "int8" not in stored["float32"]


def test_profiles_are_small_buckets_beside_a_prefill(built: Built) -> None:
    _, info = built()
    profiles = info.plans["decoder"].profiles
    assert [profile.name for profile in profiles] == ["prefill", *(f"verify-{rows}" for rows in VERIFY_ROWS)]
    assert profiles[0].sizes == {"rows": (1, 32, 64), "chosen": (1, 1, 1)}
    assert profiles[1].sizes["rows"] == (1, 1, 2)
    assert all(
        profile.sizes["rows"] == profile.sizes["chosen"] == (rows,) * 3
        for profile, rows in list(zip(profiles[1:], VERIFY_ROWS, strict=True))[1:]
    )


@pytest.mark.parametrize(("weights", "device"), CASES)
def test_heads_are_built_too(built: Built, weights: str, device: str) -> None:
    bundle, info = built("llama", weights, device)
    head = info.plans["heads/medusa"]
    text = read_plan((engine_folder(bundle, device) / info.graphs["heads/medusa"]).read_bytes())
    assert text.tensors["topk_ids.1"] == ("int64", ("1", "2", "5")) and text.tensors["topk_log_probs.1"][0] == "float"
    assert text.tensors["hidden.1"] == ("half", ("1", "1", "64"))
    assert ("int8" in head.weight_bytes) == (weights != "float32")


@pytest.mark.parametrize(("name", "fused"), [("gemma2", 0), ("opt", 2)])
def test_attention_of_other_forms(built: Built, name: str, fused: int) -> None:
    """Gemma 2 caps its scores, which no fused kernel does: decomposed, and reported. OPT's scale is 1: no copy of its cache."""
    _, info = built(name)
    assert info.passes["attention_layers"] == fused
    assert info.passes["decomposed_attention_layers"] == 2 - fused
    named = () if fused else ("self-attention 0", "self-attention 1")
    assert info.plans["decoder"].decomposed_attention == named
    assert (f"attention decomposed: {', '.join(named)}" in describe_plan(info.plans["decoder"])) == (not fused)
    assert len(info.plans["decoder"].in_place) == 4


@pytest.mark.parametrize(("name", "rows"), [("t5", 48), ("whisper", 60)])
def test_encoders_are_built_beside_their_decoders(built: Built, name: str, rows: int) -> None:
    """Text is padded to the size that was asked for; a window of audio has its own. Self- and cross-attention are fused."""
    bundle, info = built(name)
    decoder = info.plans["decoder"]
    assert set(info.plans) == {"decoder", "encoder"} and info.source_rows == rows
    assert len(decoder.in_place) == 4 and decoder.kernels["fused_attention"] == 4 * len(decoder.profiles)
    text = read_plan((engine_folder(bundle, info.device) / info.graphs["encoder"]).read_bytes())
    assert text.tensors["encoder_hidden.1"] == ("half", ("1", str(rows), "64"))


def test_fixed_scales_are_built_for_encoders(bundle_of: BundleOf, tmp_path: Path) -> None:
    """Static int8 in both graphs: what cross-attention projects of the source, too."""
    (tmp_path / "sources.txt").write_text("a source of many words\n" * 4, "utf-8")
    options = QuantizeOptions(activations="static", calibration_tokens=256)
    quantize(bundle_of("t5").path, tmp_path / "t5", options, tmp_path / "sources.txt")
    info = build(tmp_path / "t5", "trt-rtx:sm89", options=OPTIONS)
    assert set(info.plans) == {"decoder", "encoder"}
    for name in ("decoder", "encoder"):
        assert "int8" in info.plans[name].weight_bytes, name


def test_recordings_of_any_length(built: Built) -> None:
    """The encoder's time stays open, up to half a minute; its attention is fused all the same."""
    bundle, info = built("moonshine")
    encoder = info.plans["encoder"]
    axis = bundle.manifest.graphs["encoder"].inputs[0].shape[1]
    assert encoder.profiles == (Profile("any length", {str(axis): (1_600, 240_000, 480_000)}),)
    assert info.source_rows == (480_000 - 127) // 384 - 1 and encoder.kernels["fused_attention"] == 1
    with pytest.raises(OptionError, match=r"--audio-seconds 0\.1: .* hears recordings of more than 0\.1 s\."):
        TensorRtOptions(audio_seconds=0.1).source_rows(bundle)


def test_the_decomposed_form_builds_too(bundle_of: BundleOf, tmp_path: Path) -> None:
    """What JetPack 6's TensorRT is given, with a parser that is at hand: one profile, caches that come back as copies."""
    bundle = bundle_of("llama")
    graph = ir.load(bundle.path / bundle.manifest.graphs["decoder"].file)
    lowered = lower(graph, "float16", {"batch": 1, "slots": SLOTS, "rows": 4, "chosen": 4}, native=False)
    save_graph(lowered.model, tmp_path / "decoder.onnx")
    axes = {value.name: list(value.shape) for value in lowered.model.graph.inputs}
    library = open_library(parse_target("trt-rtx:sm86"))
    plan = build_plan(tmp_path / "decoder.onnx", axes, (), library, BuilderOptions(), lambda stage: None)
    assert "kv_cache_update float16" not in plan.layers and plan.in_place == ()


def test_the_engine_describes_itself(built: Built) -> None:
    bundle, info = built()
    file = engine_folder(bundle, info.device) / ENGINE_FILE
    assert from_json(EngineInfo, file.read_text()) == info
    assert info.device == "trt-rtx:sm86" and info.builder["tensorrt_rtx"] and info.settings["precision"] == "float16"
    assert (info.cache_slots, info.batch, info.relative_difference) == (SLOTS, 1, None)
    for name, plan in info.plans.items():
        assert (file.parent / info.graphs[name]).stat().st_size == plan.bytes
    assert {path.suffix for path in file.parent.rglob("*") if path.is_file()} == {".plan", ".json"}
    assert info.peak_memory_mb > 0 and built_engine(bundle, info.device) == info


@pytest.mark.parametrize(("name", "weights"), [("llama", "float32"), ("llama", "int8"), ("opt", "float32")])
def test_the_memory_plan_foresees_the_engine(built: Built, name: str, weights: str) -> None:
    """OPT's embeddings are tied: its plan holds the table twice."""
    bundle, info = built(name, weights, dict(CASES)[weights])
    plan = memory_plan(bundle, "rtx-3060-12gb", OPTIONS)
    stored = sum(sum(one.weight_bytes.values()) for one in info.plans.values())
    assert plan.weights_mb == pytest.approx(stored / 1e6, rel=0.05)
    assert plan.kernels_mb == pytest.approx((sum(one.bytes for one in info.plans.values()) - stored) / 1e6, rel=0.5)
    assert plan.cache_mb == SLOTS * plan.cache_mb_per_1000 / 1000


def test_a_stale_engine_is_refused(built: Built) -> None:
    bundle, info = built()
    changed = dataclasses.replace(bundle.manifest, files=bundle.manifest.files | {"graphs/decoder.onnx": "0" * 64})
    with pytest.raises(EngineError, match=r"built from another graphs/decoder.onnx .* Fix: headstart build"):
        built_engine(Bundle(bundle.path, changed), info.device)


def test_building_twice_needs_force(built: Built) -> None:
    bundle, info = built()
    with pytest.raises(OutputError, match="is not overwritten"):
        build(bundle.path, info.device, options=OPTIONS)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (
            "trt-rtx:sm87",
            r"cannot build for sm87. It can for: sm75, sm80, sm86, .* sm87 is Jetson Orin: build there, with --device",
        ),
        ("trt-rtx:sm110", "sm110 is Jetson Thor"),
        ("trt-rtx:sm86,sm90", "sm90 is H100 and H200"),
        ("trt-rtx", "names no GPU generation"),
        ("trt-rtx:ada", "'ada' is no GPU generation"),
        ("tensorrt:sm89", "builds for the GPU it runs on"),
    ],
)
def test_targets_that_cannot_be(bundle_of: BundleOf, device: str, message: str) -> None:
    bundle = bundle_of("llama")
    with pytest.raises(OptionError, match=message):
        build(bundle.path, device)
    assert not list((bundle.path / "engines").glob("*trt*"))


def test_no_library(bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'headstart\[trt-rtx\]'"):
        build(bundle_of("llama").path, "trt-rtx:sm89")
    with pytest.raises(EngineError, match="JetPack brings it"):
        build(bundle_of("llama").path, "tensorrt")


def refused_graph(folder: Path, operator: str = "Det") -> Path:
    """An operator, one that the parser does not know, behind a weight with a checkpoint's name."""
    source = ir.val("hidden", ir.DataType.FLOAT16, (1, 8))
    tensor = ir.tensor(torch.ones(8, 8, dtype=torch.float16).numpy(), name="layers.3.mlp.up_proj.weight")
    weight = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    product = ir.node("MatMul", [source, weight], name="product")
    strange = ir.node(operator, product.outputs, name="strange")
    out = strange.outputs[0]
    out.name, out.dtype = "out", ir.DataType.FLOAT16
    graph = ir.Graph([source], [out], nodes=[product, strange], initializers=[weight], opset_imports={"": 22}, name="refused")
    ir.save(ir.Model(graph, ir_version=10), folder / "refused.onnx")
    return folder / "refused.onnx"


def test_an_operator_the_parser_refuses(tmp_path: Path) -> None:
    file = refused_graph(tmp_path)
    library = open_library(parse_target("trt-rtx:sm89"))
    with pytest.raises(EngineError, match=r"the node strange \(Det\) .* layers.3.mlp.up_proj or just after it \(layer 3\)"):
        build_plan(file, {}, (), library, BuilderOptions(), lambda stage: None, lambda node: source_module(file, node))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: TensorRtOptions(cache=100_000), "more than the 256 tokens"),
        (lambda: TensorRtOptions(cache=8), "at least 16 tokens are needed"),
        (lambda: TensorRtOptions(precision="float8"), "'float8' is unknown"),
        (lambda: TensorRtOptions(builder=BuilderOptions(optimization_level=9)), "between 0 and 5"),
        (lambda: TensorRtOptions(fits="jetson-tx2"), "Known: jetson-orin-nano-4gb"),
    ],
)
def test_options_that_cannot_be(bundle_of: BundleOf, options: Callable[[], TensorRtOptions], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build(bundle_of("llama").path, "trt-rtx:sm89", options=options())


def test_an_engine_too_large_for_its_device(bundle_of: BundleOf) -> None:
    """A batch of a million caches."""
    with pytest.raises(HeadstartError, match=r"does not fit jetson-orin-nano-8gb: .* MB are needed .* Fix: "):
        build(bundle_of("llama").path, "trt-rtx:sm89", options=TensorRtOptions(batch=1_000_000, fits="jetson-orin-nano-8gb"))


def test_types_that_a_generation_does_not_have(bundle_of: BundleOf) -> None:
    with pytest.raises(OptionError, match="sm75 has no bfloat16"):
        build(bundle_of("llama").path, "trt-rtx:sm75,sm89", options=TensorRtOptions(precision="bfloat16"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuilderOptions(version_compatible=True), "no lean runtime"),
        (BuilderOptions(hardware_compatible=True), "trt-rtx:sm86,sm120"),
    ],
)
def test_options_that_tensorrt_for_rtx_does_not_have(bundle_of: BundleOf, options: BuilderOptions, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build(bundle_of("llama").path, "trt-rtx:sm89", options=TensorRtOptions(builder=options))


@pytest.mark.parametrize(("size", "fused"), [(8, 0), (64, 1)])
def test_attention_without_a_kernel_is_computed_in_parts(tmp_path: Path, size: int, fused: int) -> None:
    """Head size 8 has no fused kernel, and would fail the build if it were not allowed to be decomposed."""
    ends = [ir.val(name, ir.DataType.FLOAT16, (1, 4, 60, size)) for name in ("query", "key", "value")]
    node = ir.node("Attention", ends, attributes={"scale": 0.5})
    node.outputs[0].name, node.outputs[0].dtype = "out", ir.DataType.FLOAT16
    graph = ir.Graph(ends, node.outputs, nodes=[node], opset_imports={"": 24}, name="attention")
    ir.save(ir.Model(graph, ir_version=11), tmp_path / "attention.onnx")
    axes = {value.name: (1, 4, 60, size) for value in ends}
    library = open_library(parse_target("trt-rtx:sm89"))
    plan = build_plan(tmp_path / "attention.onnx", axes, (), library, BuilderOptions(), lambda stage: None)
    assert plan.kernels.get("fused_attention", 0) == fused


def test_sequences_decoded_together_leave_their_number_open(bundle_of: BundleOf, tmp_path: Path) -> None:
    """Prompts one at a time, verify passes of up to three: attention stays fused, caches stay in place."""
    bundle = bundle_of("llama")
    lowered = lower(ir.load(bundle.path / bundle.manifest.graphs["decoder"].file), "float16", {"slots": SLOTS})
    save_graph(lowered.model, tmp_path / "decoder.onnx")
    axes = {v.name: [a if isinstance(a, int) else str(a.value) for a in v.shape] for v in lowered.model.graph.inputs}
    profiles, library = decoder_profiles(32, 3, (2, 8)), open_library(parse_target("trt-rtx:sm89"))
    assert [profile.sizes["batch"] for profile in profiles] == [(1, 1, 1), (1, 3, 3), (1, 3, 3)]
    plan = build_plan(tmp_path / "decoder.onnx", axes, profiles, library, BuilderOptions(), lambda stage: None)
    assert plan.kernels["fused_attention"] == 2 * 3 and len(plan.in_place) == 4


def test_exchangeable_weights_need_a_gpu(tmp_path: Path) -> None:
    file = refused_graph(tmp_path, "Neg")
    library = open_library(parse_target("trt-rtx:sm89"))
    build_plan(file, {"hidden": (1, 8)}, (), library, BuilderOptions(workspace_mb=64), lambda stage: None)
    with pytest.raises(EngineError, match="only where there is a GPU"):
        build_plan(file, {"hidden": (1, 8)}, (), library, BuilderOptions(strip_weights=True), lambda stage: None)

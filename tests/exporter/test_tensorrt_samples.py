"""The shipped samples, whole and with their heads, really built for three generations of GPUs, with no GPU."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.export import export
from headstart.exporter.memory_plan import memory_plan
from headstart.exporter.tensorrt.options import TensorRtOptions
from headstart.exporter.tensorrt.plan import read_plan
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, KeyValueInfo, TensorInfo
from headstart.runtime.engines.info import EngineInfo, built_engine, engine_folder

pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")
pytestmark = pytest.mark.slow  # two and a half minutes: three exports and nine builds
Built = Callable[[str, str], tuple[Bundle, EngineInfo]]
CHECKPOINTS = Path(__file__).parents[2] / "samples" / "checkpoints"
DEVICE = "trt-rtx:sm86,sm89,sm120"
SAMPLES = ("pycode", "normalise", "speech")
# Of 64 inputs an int4 group's scale costs a quarter of a bit; in groups of 32 pycode, a quarter of which is its embedding
# and LM head in 8 bits, would come to 0.353 of half precision.
WEIGHTS = {"float16": None, "int8": QuantizeOptions("int8"), "int4": QuantizeOptions("int4", group=64)}
MOST = {"int8": 0.55, "int4": 0.35}  # of half precision's bytes
SOURCE = 256  # tokens; the speech sample's windows fix their own size
CASES = [(name, weights) for name in SAMPLES for weights in WEIGHTS]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """(sample, weights) -> its bundle and engine; each exported, quantized and built once."""
    folder = tmp_path_factory.mktemp("samples")
    engines: dict[tuple[str, str], tuple[Bundle, EngineInfo]] = {}

    def make(name: str, weights: str) -> tuple[Bundle, EngineInfo]:
        if (name, weights) not in engines:
            exported, target = folder / f"{name}-float16", folder / f"{name}-{weights}"
            if not exported.exists():
                export(CHECKPOINTS / name, exported, [CHECKPOINTS / name / "medusa"])
            if options := WEIGHTS[weights]:
                quantize(exported, target, options)
            bundle = Bundle.load(target)
            # A process of its own, so that the peak it notes is the build's.
            options_ = [str(target), "--device", DEVICE, "--source", str(SOURCE)]
            subprocess.run([sys.executable, "-m", "headstart", "build", *options_], check=True, stdout=subprocess.DEVNULL)
            info = built_engine(bundle, DEVICE)
            assert info is not None
            engines[name, weights] = bundle, info
        return engines[name, weights]

    return make


def names(caches: tuple[KeyValueInfo, ...]) -> set[str]:
    return {name for cache in caches for name in (cache.key_name, cache.value_name)}


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_every_graph_has_a_plan(built: Built, name: str, weights: str) -> None:
    bundle, info = built(name, weights)
    assert info.device == DEVICE and bundle.manifest.heads == ("medusa",)
    assert set(info.plans) == {*bundle.manifest.graphs, "heads/medusa"}
    assert ("frontend" in info.plans) == (name == "speech")
    for graph, plan in info.plans.items():
        assert plan.bytes == (engine_folder(bundle, DEVICE) / info.graphs[graph]).stat().st_size


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_caches_and_attention_are_native(built: Built, name: str, weights: str) -> None:
    """Of the decoder both its own attention and the source's; of every profile each layer."""
    bundle, info = built(name, weights)
    decoder, own = info.plans["decoder"], bundle.manifest.graphs["decoder"].slots
    assert decoder.layers["kv_cache_update float16"] == len(names(own)) == len(decoder.in_place)
    assert set(decoder.in_place) == {contract.updated(cache) for cache in names(own)}
    assert decoder.layers["attention_output float16"] == len(own) + len(bundle.manifest.graphs["decoder"].reads)
    for graph, plan in info.plans.items():
        layers = plan.layers.get("attention_output float16", 0)
        assert plan.kernels.get("fused_attention", 0) == layers * max(len(plan.profiles), 1)
        assert bool(layers) == (graph in ("decoder", "encoder"))


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_the_ends_are_the_manifest_s(built: Built, name: str, weights: str) -> None:
    """Every input and output of every plan, by name, type and size; a cache that is updated in place goes by one name."""
    bundle, info = built(name, weights)
    sizes = {"batch": "1", "slots": str(info.cache_slots), "source": str(info.source_rows), "chosen": "1"}
    sizes |= {"samples": "96000", "samples//160": "600"}  # six seconds
    types = {"float32": "half", "int64": "int64", "bool": "bool"}

    def wanted(tensor: TensorInfo) -> tuple[str, tuple[str, ...]]:
        kind = "float" if graph == "frontend" else types[tensor.dtype]
        return kind, tuple(sizes.get(str(axis), str(axis)) for axis in tensor.shape)

    for graph in bundle.manifest.graphs:
        text = read_plan((engine_folder(bundle, DEVICE) / info.graphs[graph]).read_bytes())
        described = bundle.manifest.graphs[graph]
        caches = names(bundle.manifest.graphs["decoder"].slots)
        inputs = [one for one in described.inputs if one.name != contract.ATTENTION_MASK]  # it is computed from row_mask
        assert {contract.updated(one.name) if one.name in caches else one.name for one in inputs} <= text.inputs
        assert (graph == "decoder") == (contract.ROW_MASK in text.inputs) == (contract.BEST_IDS in text.outputs)
        assert {one.name for one in described.outputs} <= text.outputs
        for tensor in (*inputs, *described.outputs):
            if tensor.name not in caches:
                kind, shape = text.tensors[f"{tensor.name}.1"]
                rows = [axis == "rows" for axis in tensor.shape]  # which the plan gives a name of its own
                shape = tuple("rows" if open_ else axis for open_, axis in zip(rows, shape, strict=True))
                assert (kind, shape) == wanted(tensor), tensor.name
    head = bundle.head("medusa")
    text = read_plan((engine_folder(bundle, DEVICE) / info.graphs["heads/medusa"]).read_bytes())
    assert text.tensors["hidden.1"] == ("half", ("1", "1", str(head.hidden_size)))
    candidates = ("1", str(head.heads), str(head.top_k))
    assert text.tensors["topk_ids.1"] == ("int64", candidates) and text.tensors["topk_log_probs.1"] == ("float", candidates)


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_weights_take_the_bits_that_were_asked_for(built: Built, name: str, weights: str) -> None:
    """By what the compiled plans hold: norms, scales and, in Whisper's encoder, convolutions and positions included."""
    stored = {graph: plan.weight_bytes for graph, plan in built(name, weights)[1].plans.items()}
    assert set(stored.pop("frontend", {"float": 0})) == {"float"}
    kinds = {kind for kinds in stored.values() for kind in kinds} - {"half", "float", "int32", "int64"}
    assert kinds == {"float16": set(), "int8": {"int8"}, "int4": {"int8", "int4"}}[weights]
    assert "int4" not in stored["heads/medusa"]  # heads are never stored in fewer bits than 8


@pytest.mark.parametrize(("name", "weights"), [case for case in CASES if case[1] != "float16"])
def test_what_the_weights_take_beside_half_precision(built: Built, name: str, weights: str) -> None:
    """All but the front-end in int8; in int4 all that can be, which leaves the heads out, too."""

    def total(weights_: str) -> int:
        plans = built(name, weights_)[1].plans.items()
        counted = {"decoder", "encoder"} | ({"heads/medusa"} if weights == "int8" else set())
        return sum(sum(plan.weight_bytes.values()) for graph, plan in plans if graph in counted)

    assert total(weights) <= MOST[weights] * total("float16")


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_the_memory_plan_foresees_the_build(built: Built, name: str, weights: str) -> None:
    bundle, info = built(name, weights)
    plan = memory_plan(bundle, "rtx-3060-12gb", TensorRtOptions(source=SOURCE))
    assert plan.build_mb == pytest.approx(info.peak_memory_mb, rel=0.15)
    assert plan.weights_mb == pytest.approx(sum(sum(one.weight_bytes.values()) for one in info.plans.values()) / 1e6, rel=0.05)

"""On a GPU: what the library says of a built engine, and whether it computes what the CPU engine does.

python -m pytest -m gpu tests/gpu    NOT YET RUN: no GPU was at hand when this was written.
"""

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from headstart.exporter.build import build
from headstart.exporter.tensorrt.build import TensorRtOptions
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.onnxruntime import OnnxRuntimeEngine
from headstart.runtime.engines.tensorrt import LoadedPlan, TensorRtEngine
from headstart.runtime.model import load
from headstart.runtime.prefill import prefill

pytestmark = pytest.mark.gpu
BundleOf = Callable[[str], Bundle]
RTX_GENERATIONS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


def device_here() -> str:
    """What to build for: TensorRT for RTX where it has this GPU, else the classic library."""
    runtime: Any = pytest.importorskip("cuda.bindings.runtime")
    if int(runtime.cudaGetDeviceCount()[0]):
        pytest.skip("there is no GPU here")
    attributes = runtime.cudaDeviceAttr
    numbers = [
        runtime.cudaDeviceGetAttribute(attribute, 0)[1]
        for attribute in (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor)
    ]
    generation = f"sm{numbers[0]}{numbers[1]}"
    return f"trt-rtx:{generation}" if generation in RTX_GENERATIONS else "tensorrt"


@pytest.fixture(scope="module")
def built(bundle_of: BundleOf, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("gpu") / "bundle"
    shutil.copytree(bundle_of("llama").path, folder)
    build(folder, device_here(), options=TensorRtOptions(cache=192, prefill_rows=64))
    return Bundle.load(folder)


@pytest.fixture(scope="module")
def engine(built: Bundle) -> TensorRtEngine:
    return TensorRtEngine.open(built, device_here())


def test_the_library_says_what_the_manifest_does(built: Bundle, engine: TensorRtEngine) -> None:
    plan = engine._plan
    assert isinstance(plan, LoadedPlan)
    loaded, graph = plan._engine, built.manifest.graphs["decoder"]
    names = {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
    assert names == {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    assert loaded.num_optimization_profiles == len(engine.info.plans["decoder"].profiles)
    for index, profile in enumerate(engine.info.plans["decoder"].profiles):
        shapes = loaded.get_tensor_profile_shape(contract.INPUT_IDS, index)
        assert tuple(tuple(shape)[1] for shape in shapes) == profile.sizes["rows"]
    for cache in built.manifest.caches:
        for name in (cache.key_name, cache.value_name):
            assert loaded.get_aliased_input_tensor(contract.updated(name)) == name
            assert tuple(loaded.get_tensor_shape(name))[2] == engine.info.cache_slots


def test_logits_are_the_cpu_engine_s(built: Bundle, engine: TensorRtEngine) -> None:
    prompt = np.random.default_rng(0).integers(3, 300, 75).tolist()
    found = []
    for one in (engine, OnnxRuntimeEngine(built)):
        cache = one.new_cache(1, 128)
        found.append(prefill(one, cache, prompt).logits.copy())
    assert np.abs(found[0] - found[1]).max() < 0.02 * np.ptp(found[1])


@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_greedy_tokens_are_the_cpu_engine_s(built: Bundle, drafter: str) -> None:
    texts = [
        load(built.path, device=device).generate("abc abc abc ", max_new_tokens=64, drafter=drafter, ignore_end=True).token_ids
        for device in (device_here(), "cpu")
    ]
    assert texts[0] == texts[1]

"""On a GPU: what the library says of a built engine, and whether it computes what the CPU engine does.

python -m pytest -m gpu tests/gpu    NOT YET RUN: no GPU was at hand when this was written.
"""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gpu.table import device_here

from headstart.exporter.build import build
from headstart.exporter.tensorrt.options import BuilderOptions, TensorRtOptions
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.contract import LOGITS
from headstart.runtime.engines.info import engine_folder
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.engines.trt_cuda import Cuda
from headstart.runtime.engines.trt_engine import TensorRtEngine
from headstart.runtime.engines.trt_plans import RUNTIME_CACHE, LoadedPlan
from headstart.runtime.errors import HeadstartError
from headstart.runtime.loading import load
from headstart.runtime.prefill import prefill, run_decoder

pytestmark = pytest.mark.gpu
BundleOf = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def device() -> str:
    """What to build for."""
    try:
        return device_here(Cuda())
    except HeadstartError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def built(bundle_of: BundleOf, device: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("gpu") / "bundle"
    shutil.copytree(bundle_of("llama").path, folder)
    build(folder, device, options=TensorRtOptions(cache=192, prefill_rows=64, batch=2))
    return Bundle.load(folder)


@pytest.fixture(scope="module")
def engine(built: Bundle, device: str) -> TensorRtEngine:
    return TensorRtEngine.open(built, device)


def test_the_library_says_what_the_manifest_does(built: Bundle, engine: TensorRtEngine) -> None:
    plan = engine._plan
    assert isinstance(plan, LoadedPlan)
    loaded, graph = plan.engine, built.manifest.graphs["decoder"]
    names = {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
    manifest = {tensor.name for tensor in (*graph.inputs, *graph.outputs)} - {contract.ATTENTION_MASK}
    assert names == manifest | {contract.ROW_MASK, contract.BEST_IDS}
    assert loaded.num_optimization_profiles == len(engine.info.plans["decoder"].profiles)
    for index, profile in enumerate(engine.info.plans["decoder"].profiles):
        shapes = loaded.get_tensor_profile_shape(contract.INPUT_IDS, index)
        assert tuple(tuple(shape)[1] for shape in shapes) == profile.sizes["rows"]
    for cache in built.manifest.graphs["decoder"].slots:
        for name in (cache.key_name, cache.value_name):
            assert loaded.get_aliased_input_tensor(contract.updated(name)) == name
            assert tuple(loaded.get_tensor_shape(name))[2] == engine.info.cache_slots


def test_logits_are_the_cpu_engine_s(built: Bundle, engine: TensorRtEngine) -> None:
    prompt = np.random.default_rng(0).integers(3, 300, 75).tolist()
    found = []
    for one in (engine, OnnxRuntimeEngine(built)):
        cache = one.graph("decoder").new_state(1, 128)
        found.append(prefill(one, cache, prompt)[LOGITS].copy())
    assert np.abs(found[0] - found[1]).max() < 0.02 * np.ptp(found[1])


def test_the_device_s_best_tokens_are_its_logits_best(engine: TensorRtEngine) -> None:
    """Lowest of equals, in every row of every bucket."""
    for rows in (1, 2, 4, 8, 16, 32, 64):
        ids = np.random.default_rng(rows).integers(3, 300, (1, rows))
        places = np.arange(rows)[None]
        output = run_decoder(
            engine, engine.graph("decoder").new_state(1, 128), ids, places, np.tri(rows, dtype=np.bool_)[None], places
        )
        best = [output.scores(0).best(row) for row in range(rows)]
        assert best == output[LOGITS][0].argmax(-1).tolist()


def test_replayed_passes_compute_what_the_first_did(engine: TensorRtEngine) -> None:
    """The same pass again and again, in the same memory: from the third time on classic TensorRT starts a CUDA graph."""
    found = []
    for _ in range(4):
        cache = engine.graph("decoder").new_state(1, 128)
        prefill(engine, cache, [5, 9, 17])
        rows = np.arange(4)[None]
        output = run_decoder(engine, cache, rows + 7, rows + 3, np.tri(4, dtype=np.bool_)[None], rows)
        found.append(output[LOGITS].copy())
        del cache
    assert all((logits == found[0]).all() for logits in found)


def test_sequences_together_are_what_they_are_alone(built: Bundle, device: str) -> None:
    model = load(built.path, device=device)
    prompts = ["abc abc abc ", "hello"]
    alone = [model.generate(prompt, max_new_tokens=32, drafter="none", ignore_end=True).token_ids for prompt in prompts]
    together = model.generate(prompts, max_new_tokens=32, drafter="none", ignore_end=True)
    assert [result.token_ids for result in together] == alone


@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_greedy_tokens_are_the_cpu_engine_s(built: Bundle, device: str, drafter: str) -> None:
    texts = [
        load(built.path, device=one).generate("abc abc abc ", max_new_tokens=64, drafter=drafter, ignore_end=True).token_ids
        for one in (device, "cpu")
    ]
    assert texts[0] == texts[1]


def test_weights_are_put_into_a_stripped_plan(bundle_of: BundleOf, engine: TensorRtEngine, device: str, tmp_path: Path) -> None:
    shutil.copytree(bundle_of("llama").path, tmp_path / "bundle")
    options = TensorRtOptions(cache=192, prefill_rows=64, batch=2, builder=BuilderOptions(strip_weights=True))
    build(tmp_path / "bundle", device, options=options)
    stripped = TensorRtEngine.open(Bundle.load(tmp_path / "bundle"), device)
    ours, theirs = (
        prefill(one, one.graph("decoder").new_state(1, 128), [5, 9, 17])[LOGITS].copy() for one in (stripped, engine)
    )
    assert np.abs(ours - theirs).max() < 0.01 * np.ptp(theirs)


def test_finished_kernels_are_kept(built: Bundle, device: str) -> None:
    """TensorRT for RTX alone has any to finish."""
    if device == "tensorrt":
        pytest.skip("classic TensorRT finishes its kernels when it builds")
    model = load(built.path, device=device)
    model.generate("abc", max_new_tokens=2)
    file = engine_folder(built, device) / RUNTIME_CACHE
    del model
    gc.collect()
    assert file.stat().st_size > 0

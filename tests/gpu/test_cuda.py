"""On a GPU, with onnxruntime-gpu: whether ONNX Runtime's CUDA provider computes what the CPU engine does, and all of it.

python -m pytest -m gpu tests/gpu    NOT YET RUN: no GPU was at hand when this was written.
"""

import shutil
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.build import build
from headstart.exporter.targets.cuda import CudaOptions
from headstart.runtime.bundle import Bundle
from headstart.runtime.contract import LOGITS
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.engines.ort_session import left_on_cpu
from headstart.runtime.errors import EngineError, MissingExtraError
from headstart.runtime.loading import load
from headstart.runtime.prefill import prefill

pytestmark = pytest.mark.gpu
BundleOf = Callable[[str], Bundle]
FORMS = [("float16", "none"), ("bfloat16", "none"), ("float16", "int8"), ("float16", "int4")]


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def engine(request: pytest.FixtureRequest, bundle_of: BundleOf, tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimeEngine:
    precision, weights = request.param
    folder = tmp_path_factory.mktemp("gpu") / "bundle"
    if weights == "none":
        shutil.copytree(bundle_of("llama").path, folder)
    else:
        quantize(bundle_of("llama").path, folder, QuantizeOptions(weights=weights))
    build(folder, "cuda", options=CudaOptions(precision=precision))
    try:
        return OnnxRuntimeEngine.open(Bundle.load(folder), device="cuda")
    except (EngineError, MissingExtraError) as error:
        pytest.skip(str(error))


def test_nothing_but_sizes_is_left_on_the_cpu(engine: OnnxRuntimeEngine) -> None:
    assert not left_on_cpu(engine._session(1))


def test_logits_are_the_cpu_engine_s_with_cuda_graphs(engine: OnnxRuntimeEngine) -> None:
    """Three passes of a shape: one before the capture, the capture, and its replay."""
    prompt = np.random.default_rng(0).integers(3, 300, 75).tolist()
    cpu = OnnxRuntimeEngine(engine.bundle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        caches = [one.graph("decoder").new_state(1, 128) for one in (engine, cpu)]
        for part in (prompt, [5], [6], [7]):
            found = [prefill(one, cache, part)[LOGITS].copy() for one, cache in zip((engine, cpu), caches, strict=True)]
            assert np.abs(found[0] - found[1]).max() < 0.05 * np.ptp(found[1])
    assert engine._provider.captures


@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_greedy_tokens_are_the_cpu_engine_s(engine: OnnxRuntimeEngine, drafter: str) -> None:
    if engine.bundle.manifest.quantization or engine.built is None or engine.built[0].settings["precision"] != "float16":
        pytest.skip("rounded more coarsely, texts may part")
    texts = [
        load(engine.bundle.path, device).generate("abc abc abc ", max_new_tokens=64, drafter=drafter, ignore_end=True).token_ids
        for device in ("cuda", "cpu")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["t5", "speech"])
def test_encoder_decoders(
    name: str, bundle_of: BundleOf, speech_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("gpu") / "bundle"
    shutil.copytree((speech_bundle if name == "speech" else bundle_of(name)).path, folder)
    build(folder, "cuda")
    bundle = Bundle.load(folder)
    shape = bundle.manifest.graphs["encoder"].inputs[0].shape[1:]
    source = np.random.default_rng(1).standard_normal(shape).astype(np.float32) if name == "speech" else "a source to read"
    try:
        model = load(folder, "cuda")
    except (EngineError, MissingExtraError) as error:
        pytest.skip(str(error))
    options = {"max_new_tokens": 24, "ignore_end": True, "drafter": "none"}
    assert model.generate(source, **options).token_ids == load(folder).generate(source, **options).token_ids

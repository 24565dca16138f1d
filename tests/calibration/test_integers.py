"""Activations with fixed scales and caches in int8: what the graphs hold, and that the CPU engine computes what they say."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.calibration.verify import verify
from headstart.exporter.build import build
from headstart.exporter.comparison import all_logits
from headstart.exporter.passes.linear import linears
from headstart.exporter.passes.surgery import constant_of, producer
from headstart.runtime.bundle import Bundle
from headstart.runtime.contract import LOGITS
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import OptionError
from headstart.runtime.loading import load
from headstart.runtime.prefill import last_logits, prefill, run_decoder

BundleOf = Callable[[str], Bundle]
IDS = np.arange(5, 37)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(np.random.default_rng(0).choice(list("etaoin shrdlu"), 4000)), "utf-8")
    return file


@pytest.fixture(scope="module")
def made(bundle_of: BundleOf, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, QuantizeOptions], Bundle]:
    """A quantized and built copy of a tiny model; each once."""
    folder, known = tmp_path_factory.mktemp("integers"), {}

    def make(name: str, options: QuantizeOptions) -> Bundle:
        if (name, options) not in known:
            target = folder / str(len(known))
            quantize(bundle_of(name).path, target, options, text)
            build(target)
            known[name, options] = Bundle.load(target)
        return known[name, options]

    return make


STATIC = QuantizeOptions(activations="static", calibration_tokens=512)
CACHED = QuantizeOptions(kv_cache="int8", calibration_tokens=512)
SMOOTH = QuantizeOptions(method="smoothquant", activations="static", calibration_tokens=512)


def graph_of(bundle: Bundle, file: str = "graphs/decoder.onnx") -> ir.Model:
    return ir.load(bundle.path / file)


def test_static_activations_are_one_scale_around_each_product(made: Callable[[str, QuantizeOptions], Bundle]) -> None:
    model = graph_of(made("llama", STATIC))
    assert {node.domain for node in model.graph} == {""}
    inner = list(linears(model))[:-1]
    for linear in inner:
        dequantize = producer(linear.node.inputs[0], "DequantizeLinear")
        scale, zero = (constant_of(value) for value in dequantize.inputs[1:])
        assert scale is not None and scale.shape == () and zero is not None and zero.dtype == np.int8 and zero == 0
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert len(inner) == 14 and len(quantizers) == 8, "query, key and value read one value; so do gate and up"


@pytest.mark.parametrize("options", [STATIC, SMOOTH, CACHED])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_stay_near_the_float_model(
    made: Callable[[str, QuantizeOptions], Bundle], bundle_of: BundleOf, name: str, options: QuantizeOptions
) -> None:
    wanted = all_logits(OnnxRuntimeEngine(bundle_of(name)), IDS)
    bundle = made(name, options)
    for engine in (OnnxRuntimeEngine(bundle), OnnxRuntimeEngine.open(bundle)):
        assert 1e-5 < np.abs(all_logits(engine, IDS) - wanted).max() / np.ptp(wanted) < 0.06


def test_the_cpu_engine_takes_the_fixed_scales(made: Callable[[str, QuantizeOptions], Bundle]) -> None:
    kinds = [node.op_type for node in graph_of(made("llama", STATIC), "engines/cpu/decoder.onnx").graph]
    assert kinds.count("ReduceMax") == 1, "the LM head alone looks at its rows"
    assert kinds.count("MatMulIntegerToFloat") == 2 * 4 + 1 and "DequantizeLinear" not in kinds


@pytest.mark.parametrize("options", [STATIC, CACHED])
def test_chain_rows_are_bit_equal_to_single_steps(
    made: Callable[[str, QuantizeOptions], Bundle], options: QuantizeOptions
) -> None:
    engine = OnnxRuntimeEngine.open(made("llama", options))
    prompt, chain = list(range(5, 25)), list(range(30, 46))
    stepwise, at_once = engine.graph("decoder").new_state(1, 64), engine.graph("decoder").new_state(1, 64)
    prefill(engine, stepwise, prompt)
    singles = [last_logits(prefill(engine, stepwise, [token])) for token in chain]
    prefill(engine, at_once, prompt)
    rows = np.arange(len(chain))[None]
    output = run_decoder(engine, at_once, np.array([chain]), len(prompt) + rows, np.tri(len(chain), dtype=np.bool_)[None], rows)
    assert (output[LOGITS][0] == np.stack(singles)).all()


def test_an_int8_cache_is_a_quarter_and_decodes_trees(made: Callable[[str, QuantizeOptions], Bundle]) -> None:
    bundle = made("llama", CACHED)
    engine = OnnxRuntimeEngine.open(bundle)
    cache = engine.graph("decoder").new_state(1, 64)
    assert all(buffer.dtype == np.int8 for buffer in cache.parts[0].arrays.values())
    prefill(engine, cache, list(range(5, 30)))
    stored = np.concatenate([buffer[:, :, :25].ravel() for buffer in cache.parts[0].arrays.values()])
    assert np.abs(stored.astype(int)).max() > 100, "the range found on text is the range used"
    kinds = [node.op_type for node in graph_of(bundle, "engines/cpu/decoder.onnx").graph]
    assert kinds.count("GroupQueryAttention") == 2 and "TensorScatter" not in kinds
    assert verify(bundle.path, ["abc", "hello"], 16, samples=100).ok


def test_a_batch_with_an_int8_cache_equals_single_runs(made: Callable[[str, QuantizeOptions], Bundle]) -> None:
    model = load(made("llama", CACHED).path)
    prompts = ["abc", "hello there"]
    together = [r.token_ids for r in model.generate(prompts, max_new_tokens=6, ignore_end=True)]
    assert together == [model.generate(p, max_new_tokens=6, ignore_end=True).token_ids for p in prompts]


def test_what_integers_need(bundle_of: BundleOf, tmp_path: Path) -> None:
    for options in (STATIC, CACHED, SMOOTH):
        with pytest.raises(OptionError, match=r"are measured on text\. Fix: --data FILE"):
            quantize(bundle_of("llama").path, tmp_path / "out", options)
    with pytest.raises(OptionError, match=r"--activations static makes int8 products.*--weights int8"):
        QuantizeOptions(weights="int4", activations="static")
    with pytest.raises(OptionError, match="--method smoothquant makes int8 products"):
        QuantizeOptions(weights="int4", method="smoothquant")
    assert not (tmp_path / "out").exists()

"""The CUDA recipe: numbers against the canonical graph, and every node against the provider's registered kernels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tensorrt_steps import FLOAT16_NOISE, decoder, run

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.build import build
from headstart.exporter.graph import save_graph
from headstart.exporter.lowering.cuda import lower
from headstart.exporter.lowering.placement import left_on_cpu
from headstart.exporter.passes.matmul_nbits import pack_weights
from headstart.exporter.passes.rotation import is_rotation
from headstart.exporter.targets.cuda import CudaOptions
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import engine_folder
from headstart.runtime.engines.ort_session import open_session
from headstart.runtime.errors import EngineError

BundleOf = Callable[[str], Bundle]
EXACT = 1e-5  # of the logits' range: float32, another order of summation


def difference(found: list[NDArray[np.float32]], wanted: list[NDArray[np.float32]]) -> float:
    return max(float(np.abs(ours - theirs).max() / np.ptp(theirs)) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3", "opt"])
def test_the_lowered_decoder_computes_the_same(name: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = bundle_of(name)
    wanted = run(decoder(bundle), bundle, tmp_path / "canonical.onnx")
    for precision, limit in (("float32", EXACT), ("float16", FLOAT16_NOISE)):
        lowered = lower(decoder(bundle), precision)
        assert difference(run(lowered.model, bundle, tmp_path / f"{precision}.onnx"), wanted) < limit
        assert not left_on_cpu(lowered.model)
        assert lowered.passes["cache_updates"] >= 4 and lowered.passes["attention_layers"] == 2


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_decoders_have_kernels(weights: str, precision: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = quantize(bundle_of("llama").path, tmp_path / "bundle", QuantizeOptions(weights=weights))
    lowered = lower(decoder(bundle), precision)
    assert not left_on_cpu(lowered.model)
    products = [node for node in lowered.model.graph if node.op_type in ("MatMul", "MatMulNBits")]
    linears = [node for node in products if not is_rotation(node.inputs[1])]
    assert lowered.passes["quantized_linears"] == len(linears), "every layer is packed, the LM head included"


def linear_model(values: NDArray[np.int8], scales: NDArray[np.float32], dtype: ir.DataType, block: int) -> ir.Model:
    """x [rows, K] times a quantized weight [K, N]."""
    inputs = ir.Value(name="x", shape=ir.Shape(["rows", len(values)]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(name="w.quantized", const_value=ir.tensor(values.tolist(), dtype=dtype, name="w.quantized"))
    weight.shape, weight.dtype = ir.Shape(values.shape), dtype
    scale = ir.Value(name="w.scale", const_value=ir.tensor(scales, name="w.scale"))
    scale.shape, scale.dtype = ir.Shape(scales.shape), ir.DataType.FLOAT
    attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
    widened = ir.node("DequantizeLinear", [weight, scale], attributes=attributes)
    product = ir.node("MatMul", [inputs, widened.outputs[0]])
    out = product.outputs[0]
    out.name, out.dtype, out.shape = "y", ir.DataType.FLOAT, ir.Shape(["rows", values.shape[1]])
    graph = ir.Graph([inputs], [out], nodes=[widened, product], initializers=[weight, scale], opset_imports={"": 24}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("inputs", "group", "block"),
    [
        (128, 0, 32),
        (96, 0, 16),
        (128, 32, 32),
        (128, 64, 32),
        (256, 128, 32),
        (96, 32, 16),
        (64, 16, 0),
        (40, 0, 16),
        (72, 24, 0),
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_multiply_as_before(bits: int, inputs: int, group: int, block: int, tmp_path: Path) -> None:
    """`group` 0 is one scale for each output. Blocks of 32 only where the fast kernel takes the layer: K a multiple of 64."""
    generator = np.random.default_rng(inputs + group)
    half = 1 << (bits - 1)
    values = generator.integers(-half, half, (inputs, 8)).astype(np.int8)
    scales = generator.uniform(0.5, 1, (inputs // group, 8) if group else 8).astype(np.float32)
    dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    model, changed = pack_weights(linear_model(values, scales, dtype, group))
    assert changed == bool(block)
    packed = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert [node.attributes["block_size"].value for node in packed] == [block] * changed
    x = generator.standard_normal((3, inputs)).astype(np.float32)
    wanted = x @ (values * (np.repeat(scales, group, axis=0) if group else scales))
    save_graph(model, tmp_path / "packed.onnx")
    found = open_session(tmp_path / "packed.onnx", 1, as_written=True).run(None, {"x": x})[0]
    assert np.abs(found - wanted).max() < 1e-4 * np.ptp(wanted)


def test_a_node_without_a_kernel_is_named(bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lower(decoder(bundle_of("llama")), "float16").model
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.inputs[0].dtype = ir.DataType.DOUBLE
    assert left_on_cpu(model)[0].endswith(": Attention(double, float16, float16, float16)")
    monkeypatch.setattr("headstart.exporter.lowering.placement.registry", lambda: ("1.31.1", {"MatMul": []}))
    with pytest.raises(EngineError, match=r"CUDA provider of ONNX Runtime 1\.31\.1 has no kernel for \d+ nodes of decoder"):
        build(bundle_of("llama").path, "cuda")
    assert not engine_folder(bundle_of("llama"), "cuda").exists(), "nothing is left behind"


def test_arithmetic_on_sizes_may_stay(bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lower(decoder(bundle_of("llama")), "float16").model
    monkeypatch.setattr("headstart.exporter.lowering.placement.registry", lambda: ("0", {}))
    left = {line.split(": ")[1].split("(")[0] for line in left_on_cpu(model)}
    assert "Shape" not in left and {"MatMul", "Attention", "TensorScatter", "GatherElements"} <= left


@pytest.mark.parametrize(("operator", "left"), [("GroupNormalization", 0), ("MeanVarianceNormalization", 1)])
def test_functions_that_are_decomposed_need_no_kernel(operator: str, left: int) -> None:
    """Moonshine's encoder begins with the first; the second has a kernel on the CPU alone."""
    half = ir.TensorType(ir.DataType.FLOAT16)
    x, scale, bias = (ir.Value(name=name, type=half) for name in ("x", "scale", "bias"))
    node = ir.node(operator, [x, scale, bias][: 3 if left == 0 else 1])
    node.outputs[0].dtype = ir.DataType.FLOAT16
    graph = ir.Graph([x, scale, bias], node.outputs, nodes=[node], opset_imports={"": 24}, name="g")
    assert len(left_on_cpu(ir.Model(graph, ir_version=10))) == left


def test_bfloat16_is_built_and_not_compared(bundle_of: BundleOf, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(bundle_of("llama").path, tmp_path / "bundle")
    info = build(tmp_path / "bundle", "cuda", options=CudaOptions(precision="bfloat16"))
    assert info.settings["precision"] == "bfloat16" and info.relative_difference is None and not info.differences
    assert set(info.graphs) == {"decoder", "commit", "gather"}

"""The choice of integer products: exact ones only, computed when the engine is opened, of equal results."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter import integer_probe
from headstart.exporter.build import build
from headstart.exporter.integer_probe import INPUT, SIZE, Probed, fastest_exact, probe_model
from headstart.exporter.passes.per_row_int8 import PRODUCTS, Product, lower_linears, shifted
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import ENGINE_FILE, engine_folder
from headstart.runtime.engines.ort_session import open_session
from headstart.runtime.errors import EngineError
from headstart.runtime.loading import load
from headstart.runtime.output import hash_files

EXACT = Product("uint8", "uint8")  # sums of pairs in 32 bits on every CPU


def error_of(model: ir.Model, folder: Path, rows: np.ndarray | None = None) -> float:
    ir.save(model, folder / "probe.onnx")
    return float(open_session(folder / "probe.onnx", 1).run(None, {} if rows is None else {INPUT: rows})[0])


def test_the_product_chosen_is_exact_and_its_probe_stays(tmp_path: Path) -> None:
    probed = fastest_exact(tmp_path)
    assert probed.product in PRODUCTS and probed.product_ms > 0 and probed.float_ms > 0
    assert float(open_session(tmp_path / "probe.onnx", 1).run(None, {})[0]) == 0


def test_a_product_that_overflows_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflows(product: Product) -> ir.Model:
        model = probe_model(product)
        if product != EXACT:
            model.graph.initializers["expected"].const_value = ir.tensor(np.zeros((1, SIZE), np.float32), name="expected")
        return model

    monkeypatch.setattr(integer_probe, "probe_model", overflows)
    assert fastest_exact(tmp_path).product == EXACT
    monkeypatch.setattr(integer_probe, "PRODUCTS", tuple(product for product in PRODUCTS if product != EXACT))
    with pytest.raises(EngineError, match="float32 bundle"):
        fastest_exact(tmp_path)


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_the_probe_multiplies_when_it_is_run(product: Product, tmp_path: Path) -> None:
    """Constants would be multiplied while the session is made, by other kernels, and timing would time nothing."""
    assert error_of(probe_model(product), tmp_path, np.zeros((8, SIZE), product.activations)) > 0


def test_shifted_values_are_the_same_by_their_zero_point() -> None:
    values = np.arange(-128, 128).astype(np.int8).reshape(2, 128).T  # not contiguous
    assert (shifted(values, "uint8").astype(int) - 128 == values).all()
    assert (shifted(values, "int8") == values).all()


def test_exact_products_agree_to_the_last_bit(tmp_path: Path) -> None:
    """The same integers, whatever they are stored as: K and N of a small language model, with a tied layout."""
    rng = np.random.default_rng(0)
    weight, scales = rng.integers(-127, 128, (640, 1024)).astype(np.int8), rng.random(640).astype(np.float32)
    rows = rng.standard_normal((5, 1024)).astype(np.float32)
    results = []
    for product in (Product("int8", "int8"), EXACT):
        model, changed = lower_linears(linear_model(weight, scales), product)
        assert changed
        ir.save(model, tmp_path / "linear.onnx")
        results.append(open_session(tmp_path / "linear.onnx", 1).run(None, {"x": rows})[0])
    assert (results[0] == results[1]).all()
    wanted = rows @ (weight.astype(np.float32) * scales[:, None]).T
    assert np.abs(results[1] - wanted).max() < 0.02 * np.abs(wanted).max()


def linear_model(weight: np.ndarray, scales: np.ndarray) -> ir.Model:
    """x [T, K] by a quantized matrix stored [N, K], as a tied embedding is."""
    x = ir.Value(name="x", shape=ir.Shape(["T", weight.shape[1]]), type=ir.TensorType(ir.DataType.FLOAT))
    constants = []
    for name, array in (("weight", weight), ("scales", scales)):
        tensor = ir.tensor(array, name=name)
        constants.append(ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor))
    floats = ir.node("DequantizeLinear", constants, attributes={"axis": 0})
    transposed = ir.node("Transpose", floats.outputs, attributes={"perm": [1, 0]})
    product = ir.node("MatMul", [x, transposed.outputs[0]])
    out = product.outputs[0]
    out.name, out.dtype, out.shape = "y", ir.DataType.FLOAT, ir.Shape(["T", weight.shape[0]])
    nodes = [floats, transposed, product]
    return ir.Model(ir.Graph([x], [out], nodes=nodes, initializers=constants, opset_imports={"": 21}), ir_version=10)


def test_a_note_says_where_integers_are_slower() -> None:
    fast = Probed(EXACT, product_ms=1.0, float_ms=2.0)
    assert fast.settings == {"activations": "uint8", "weights": "uint8"}
    slow = dataclasses.replace(fast, product_ms=9.0)
    assert slow.settings["note"] == "slower than float32 on this CPU: its 8-bit products take 4.5 times as long"


def test_an_engine_of_another_cpu_is_refused(bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    """Its probe, which expects other sums here, stands for a CPU that overflows."""
    bundle = tmp_path / "bundle"
    quantize(bundle_of("llama").path, bundle, QuantizeOptions(weights="int8"))
    build(bundle)
    folder = engine_folder(Bundle.load(bundle), "cpu")
    settings = json.loads((folder / ENGINE_FILE).read_text())["settings"]
    assert {"activations", "weights"} <= settings.keys()
    load(bundle)
    model = probe_model(Product(settings["activations"], settings["weights"]))
    model.graph.initializers["expected"].const_value = ir.tensor(np.zeros((1, SIZE), np.float32), name="expected")
    ir.save(model, folder / "probe.onnx")
    rehash(folder)
    with pytest.raises(EngineError, match=r"multiplies uint8 by u?int8 exactly|multiplies int8 by int8 exactly"):
        load(bundle)


def rehash(folder: Path) -> None:
    """Let the engine's file say what its files hash to now."""
    stated = json.loads((folder / ENGINE_FILE).read_text())
    (folder / ENGINE_FILE).unlink()
    stated["files"] = hash_files(folder)
    (folder / ENGINE_FILE).write_text(json.dumps(stated))

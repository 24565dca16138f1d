"""Weights of any size may lie in an external data file: whatever evaluates, rewrites or moves a part of a graph reads them.

Writers keep small tensors inside the graph's own file, and those of tiny test models are all small. Here even floating-point
scalars are moved out, so that a pass that forgets the data file cannot stay hidden.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.build import build
from headstart.exporter.graph import save_beside, save_graph, weight_infos
from headstart.exporter.lowering.tensorrt import lower
from headstart.runtime.bundle import Bundle, write_manifest

BundleOf = Callable[[str], Bundle]
NAMES = ("llama", "gemma3", "opt", "t5")  # rotary, two rotary tables and windows, learned positions, relative positions


@pytest.fixture
def external(bundle_of: BundleOf, tmp_path: Path) -> Callable[[str], Bundle]:
    """architecture -> a copy of its bundle in which every floating-point initializer of every graph is external."""

    def make(name: str) -> Bundle:
        bundle = Bundle(Path(shutil.copytree(bundle_of(name).path, tmp_path / "external")), bundle_of(name).manifest)
        graphs = {bundle.path / info.file: ir.load(bundle.path / info.file) for info in bundle.manifest.graphs.values()}
        for model in graphs.values():
            ir.external_data.load_to_model(model)  # the data files are about to be replaced
        for file, model in graphs.items():
            save_all_external(model, file)
        shared = weight_infos(bundle.path / bundle.manifest.graphs["decoder"].file, "graphs")
        write_manifest(bundle.path, dataclasses.replace(bundle.manifest, weights=shared))
        return Bundle.load(bundle.path)

    return make


def save_all_external(model: ir.Model, file: Path) -> None:
    """Of integers, which give shapes and axes, ONNX Runtime itself reads no external ones."""
    floats = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
    tensors = [value.const_value for value in floats]
    stored = ir.external_data.convert_tensors_to_external(tensors, file.parent, f"{file.name}.data")
    for value, tensor in zip(floats, stored, strict=True):
        value.const_value = tensor
    ir.save(model, file)
    assert min(tensor.nbytes for tensor in stored) <= 256, "nothing small was moved"


@pytest.mark.parametrize("name", NAMES)
def test_building_for_the_cpu(name: str, external: Callable[[str], Bundle]) -> None:
    """The build compares one sequence and a batch with the canonical graph."""
    assert build(external(name).path).relative_difference < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_quantizing_and_building(name: str, bundle_of: BundleOf, external: Callable[[str], Bundle], tmp_path: Path) -> None:
    differences = []
    for bundle in (bundle_of(name), external(name)):
        target = tmp_path / f"int8-{bundle.path.name}"
        quantize(bundle.path, target, QuantizeOptions(weights="int8"))
        differences.append(build(target).relative_difference)
    assert differences[0] == differences[1] > 0


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_building_for_cuda(name: str, bundle_of: BundleOf, external: Callable[[str], Bundle], tmp_path: Path) -> None:
    inline = Path(shutil.copytree(bundle_of(name).path, tmp_path / "inline"))
    differences = [build(bundle, "cuda").relative_difference for bundle in (inline, external(name).path)]
    assert differences[0] == differences[1] > 0


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_lowering_for_tensorrt(name: str, native: bool, bundle_of: BundleOf, external: Callable[[str], Bundle]) -> None:
    """The same nodes and the same bytes as from a graph with small weights inside."""
    lowered = []
    for bundle in (bundle_of(name), external(name)):
        model = ir.load(bundle.path / bundle.manifest.graphs["decoder"].file)
        lowered.append(lower(model, "float16", {"batch": 1, "slots": 64}, native).model.graph)
    ours, theirs = lowered
    assert [node.op_type for node in ours] == [node.op_type for node in theirs]
    weights = [sorted(value.const_value.tobytes() for value in graph.initializers.values()) for graph in lowered]
    assert weights[0] == weights[1]


def small_graph(values: np.ndarray) -> ir.Model:
    """y = x + values, over a large weight that nothing else names."""
    x = ir.val("x", ir.DataType.FLOAT, (len(values),))
    tensors = [ir.tensor(values, name="values"), ir.tensor(np.zeros(1000, np.float32), name="large")]
    weights = [ir.Value(name=t.name, shape=t.shape, type=ir.TensorType(t.dtype), const_value=t) for t in tensors]
    node = ir.node("Add", [x, weights[0]])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape((len(values),))
    return ir.Model(ir.Graph([x], node.outputs, nodes=[node], initializers=weights, opset_imports={"": 24}), ir_version=11)


@pytest.mark.parametrize("size", [16, 100, 1000])
def test_a_weight_loaded_from_another_folder_keeps_its_values(size: int, tmp_path: Path) -> None:
    """`decoder.onnx.data` of the bundle and of the engine have the same name: an offset into one means nothing in the other."""
    values = np.arange(size, dtype=np.float32)
    for folder in ("bundle", "engine"):
        (tmp_path / folder).mkdir()
    ir.save(small_graph(values), tmp_path / "bundle/a.onnx", external_data="a.onnx.data", size_threshold_bytes=0)
    save_graph(small_graph(values + 1), tmp_path / "engine/a.onnx")
    save_beside(ir.load(tmp_path / "bundle/a.onnx"), tmp_path / "engine/b.onnx", tmp_path / "engine/a.onnx")
    stored = ir.load(tmp_path / "engine/b.onnx").graph.initializers
    assert (stored["values"].const_value.numpy() == values).all()
    assert str(stored["large"].const_value.location) == "a.onnx.data", "equal weights are stored once"

"""What integer graphs compute, written out in floats: the build's measure where weights have outliers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from cpu_target import written

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter import canonical
from headstart.exporter.check import Inputs, _difference, check_graphs
from headstart.exporter.golden import read_golden
from headstart.exporter.graph import save_graph
from headstart.exporter.passes.row_rounding import round_rows
from headstart.exporter.targets.target import Form
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import EngineError

BundleOf = Callable[[str], Bundle]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "t5"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_lowered_graphs_equal_the_rounded_ones(bundle_of: BundleOf, tmp_path: Path, name: str, weights: str) -> None:
    """A typical row to the last bits, where the unrounded graph is percents away: only the rounding is different."""
    bundle = quantize(bundle_of(name).path, tmp_path / "small", QuantizeOptions(weights=weights))
    target, golden = written(bundle, tmp_path / "engine"), read_golden(bundle)
    inputs = Inputs(bundle, golden["input_ids"][:1], golden["sources"][:1] if "sources" in golden else None)
    for graph in sorted(bundle.graphs, reverse=True):  # encoders first: decoders read what they return
        rounded, changed = round_rows(canonical.load_graph(bundle, graph))
        save_graph(rounded, tmp_path / f"{graph}.onnx")
        floats, ours = inputs.reference(graph), inputs.run(graph, target.forms(graph)[0])
        wanted = inputs.run(graph, Form(tmp_path / f"{graph}.onnx"))
        found, unrounded = _difference(graph, ours, wanted, 1), _difference(graph, ours, floats, 1)
        assert changed and found.median < 2e-6 < unrounded.median
        assert found.largest < unrounded.largest / 3  # a value between two integers may still fall on either side


@pytest.mark.parametrize("form", ["decoder", "decoder_batch"])
def test_a_wrong_integer_is_no_rounding(bundle_of: BundleOf, tmp_path: Path, form: str) -> None:
    bundle = quantize(bundle_of("llama").path, tmp_path / "small")
    target = written(bundle, tmp_path / "engine")
    file = target.folder / target.graphs[form]
    model = ir.load(file)
    weight = next(value for name, value in model.graph.initializers.items() if "down_proj" in name and "int8" in name)
    assert weight.const_value is not None
    weight.const_value = ir.tensor(np.ascontiguousarray(weight.const_value.numpy()[::-1]), name=weight.name)
    ir.save(model, file, external_data=f"{file.name}.edited")
    with pytest.raises(EngineError, match=r"or by what rounding the activations does to the canonical graph. This is a defect"):
        check_graphs(bundle, target)

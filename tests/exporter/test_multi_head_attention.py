"""Attention without a mask on ONNX Runtime's fused operator: the same numbers, and nothing left to transpose."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from headstart.exporter.build import build
from headstart.exporter.graph_builder import GraphBuilder
from headstart.exporter.passes.multi_head_attention import fuse_unmasked_attention
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import engine_folder
from headstart.runtime.engines.ort_session import CPU

HEADS = 3


def attention_model(size: int, mask: bool = False, grouped: bool = False, **attributes: Any) -> ir.Model:
    """Queries of 7 rows and keys of 5, as linear layers return them: [B, rows, heads · size]."""
    graph = GraphBuilder()
    kv_heads = 1 if grouped else HEADS
    inputs = [
        ir.val(name, ir.DataType.FLOAT, ("batch", rows, heads * size))
        for name, rows, heads in (("q", 7, HEADS), ("k", 5, kv_heads), ("v", 5, kv_heads))
    ]
    heads = []
    for value, count in zip(inputs, (HEADS, kv_heads, kv_heads), strict=True):
        split = graph.node("Reshape", [value, graph.ints(f"split_{count}", [0, 0, count, size])])
        heads.append(graph.node("Transpose", [split], perm=[0, 2, 1, 3]))
        heads[-1].shape = ir.Shape(("batch", count, value.shape[1], size))
    masks = [graph.constant("mask", np.tri(7, 5, dtype=np.bool_))] if mask else []
    attended = graph.node("Attention", [*heads, *masks], **attributes)
    attended.shape = ir.Shape(("batch", HEADS, 7, size))
    rows_first = graph.node("Transpose", [attended], perm=[0, 2, 1, 3])
    out = graph.node("Reshape", [rows_first, graph.ints("joined", [0, 0, HEADS * size])])
    out.name, out.dtype, out.shape = "out", ir.DataType.FLOAT, ir.Shape(("batch", 7, HEADS * size))
    return graph.model(inputs, [out], "attention")


def run(model: ir.Model) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {i.name: rng.standard_normal((2, *i.shape[1:])).astype(np.float32) for i in session.get_inputs()}
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize("size", [64, 80, 256])
@pytest.mark.parametrize("attributes", [{}, {"scale": 1.0}, {"scale": 0.05}])
def test_the_fused_operator_computes_the_same(size: int, attributes: dict[str, float]) -> None:
    wanted = run(attention_model(size, **attributes))
    fused, changed = fuse_unmasked_attention(attention_model(size, **attributes))
    assert changed and [node.op_type for node in fused.graph] == ["MultiHeadAttention"]
    np.testing.assert_allclose(run(fused), wanted, atol=2e-6)


@pytest.mark.parametrize("unfit", [{"mask": True}, {"grouped": True}, {"is_causal": 1}, {"softcap": 5.0}])
def test_what_asks_for_more_stays(unfit: dict[str, Any]) -> None:
    model, changed = fuse_unmasked_attention(attention_model(64, **unfit))
    assert not changed and "MultiHeadAttention" not in {node.op_type for node in model.graph}


@pytest.mark.parametrize("name", ["whisper", "moonshine"])
def test_encoders_of_speech_transpose_no_heads(
    name: str, bundle_of: Callable[[str], Bundle], made_once: Callable[[str, Callable[[Path], object]], Path]
) -> None:
    """Every layer; `build` compares the result with the canonical graph."""
    folder = made_once(f"built/{name}", lambda copy: built_copy(bundle_of(name), copy))
    canonical, built = (
        Counter(node.op_type for node in ir.load(file).graph)
        for file in (folder / "graphs/encoder.onnx", engine_folder(Bundle.load(folder), "cpu") / "encoder.onnx")
    )
    assert built["MultiHeadAttention"] == canonical["Attention"] > 0 == built["Attention"]


def test_norms_and_additions_stay_apart(tmp_path: Path) -> None:
    """In the sessions of the CPU: without their entry, ONNX Runtime joins the two itself."""
    graph = GraphBuilder()
    x, y = (ir.val(name, ir.DataType.FLOAT, ("batch", 4, 64)) for name in "xy")
    ones, zeros = graph.constant("gain", np.ones(64, np.float32)), graph.constant("bias", np.zeros(64, np.float32))
    out = graph.node("LayerNormalization", [graph.node("Add", [x, y]), ones, zeros], axis=-1)
    out.name, out.dtype, out.shape = "out", ir.DataType.FLOAT, ir.Shape(("batch", 4, 64))
    model = ir.to_proto(graph.model([x, y], [out], "norm")).SerializeToString()

    def operators(entries: dict[str, str]) -> set[str]:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        for entry, value in entries.items():
            options.add_session_config_entry(entry, value)
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return {node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph}

    assert operators(CPU.entries) == {"Add", "LayerNormalization"}
    assert operators({}) == {"SkipLayerNormalization"}


def built_copy(bundle: Bundle, folder: Path) -> None:
    shutil.copytree(bundle.path, folder)
    build(folder)

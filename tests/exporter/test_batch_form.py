"""The batch form on the CPU: attention over the slots that are used, and single rows that are summed as several are."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.build import build
from headstart.exporter.passes.query_rows import pad_query_rows
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.contract import LOGITS
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.engines.ort_session import MIN_ROWS, open_session
from headstart.runtime.errors import EngineError
from headstart.runtime.prefill import prefill, run_decoder
from headstart.runtime.states import SLOT_STEP, GraphState

BundleOf = Callable[[str], Bundle]
LENGTHS = (20, 33, SLOT_STEP - 4)  # the longest gets past the first SLOT_STEP slots while the chain is decoded
ROWS = 6
FLOATS = ir.TensorType(ir.DataType.FLOAT)


def prefilled(engine: OnnxRuntimeEngine, slots: int = 3 * SLOT_STEP) -> GraphState:
    state = engine.graph("decoder").new_state(len(LENGTHS), slots)
    for index, length in enumerate(LENGTHS):
        prefill(engine, state.row(index), [(7 * token + index) % 250 + 3 for token in range(length)])
    return state


def forward(engine: OnnxRuntimeEngine, state: GraphState, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """[B, T, V] logits of a chain."""
    batch, count = ids.shape
    rows = np.broadcast_to(np.arange(count), (batch, count))
    mask = np.broadcast_to(np.tri(count, dtype=np.bool_), (batch, count, count))
    return run_decoder(engine, state, ids, state.lengths[:, None] + rows, mask, rows)[LOGITS].copy()


@pytest.mark.parametrize(("name", "weights"), [("llama", "int8"), ("gpt2", "float32"), ("gemma2", "float32")])
def test_a_batch_steps_as_it_verifies(bundle_of: BundleOf, tmp_path: Path, name: str, weights: str) -> None:
    """Bit for bit: grouped heads, a head for each query, decomposed attention; before and after more slots are read."""
    if weights == "float32":
        shutil.copytree(bundle_of(name).path, tmp_path / "bundle")
    else:
        quantize(bundle_of(name).path, tmp_path / "bundle", QuantizeOptions(weights=weights))
    build(tmp_path / "bundle")
    engine = OnnxRuntimeEngine.open(Bundle.load(tmp_path / "bundle"), 1)
    chain = np.arange(30, 30 + ROWS * len(LENGTHS)).reshape(len(LENGTHS), ROWS)
    at_once = forward(engine, prefilled(engine), chain)
    state, steps = prefilled(engine), []
    for row in range(ROWS):
        steps.append(forward(engine, state, chain[:, row : row + 1])[:, 0])
        state.lengths += 1
    assert (np.stack(steps, 1) == at_once).all()
    assert (forward(engine, prefilled(engine, 8 * SLOT_STEP), chain) == at_once).all()  # capacity is not read
    for index in range(len(LENGTHS)):
        alone = forward(engine, prefilled(engine).row(index), chain[index : index + 1])[0]
        # The two operators differ in their last bits; an integer that is rounded the other way makes more of that.
        assert np.abs(alone - at_once[index]).max() < (1e-6 if weights == "float32" else 1e-2) * np.ptp(alone)


def test_no_more_slots_are_kept_than_are_used(bundle_of: BundleOf, tmp_path: Path) -> None:
    """One sequence's form as well. What was written before stays, and a pass beyond the capacity says so."""
    shutil.copytree(bundle_of("llama").path, tmp_path / "bundle")
    build(tmp_path / "bundle")
    engine = OnnxRuntimeEngine.open(Bundle.load(tmp_path / "bundle"), 1)
    for batch in (1, 3):
        state, widths = engine.graph("decoder").new_state(batch, 3 * SLOT_STEP), []
        for length in (0, SLOT_STEP - 2, SLOT_STEP - 1, 2 * SLOT_STEP, 3 * SLOT_STEP, 5):
            state.lengths[:] = length
            forward(engine, state, np.full((batch, 2), 7))
            (binding,) = state.bound.values()
            widths.append(binding.inputs.arrays[contract.ATTENTION_MASK].shape[3])
        largest = 3 * SLOT_STEP + MIN_ROWS
        assert widths == [SLOT_STEP, SLOT_STEP, 2 * SLOT_STEP, 3 * SLOT_STEP, largest, largest]
        assert all(np.abs(array[:, :, 0]).max() > 0 for array in state.parts[0].arrays.values())
        state.lengths[:] = 3 * SLOT_STEP + 1
        with pytest.raises(EngineError, match=r"holds 194 slots, and this pass needs 195"):
            forward(engine, state, np.full((batch, 2), 7))


def test_a_longer_snapshot_is_what_the_next_pass_reads(bundle_of: BundleOf) -> None:
    """Restoring it replaces the arrays that earlier passes of this state were bound to."""
    engine = OnnxRuntimeEngine(bundle_of("llama"), 1)
    graph, chain = engine.graph("decoder"), np.array([[40, 41, 42]])
    long, short = (graph.new_state(1, 3 * SLOT_STEP) for _ in range(2))
    prefill(engine, long, [(7 * token) % 250 + 3 for token in range(SLOT_STEP + 20)])
    wanted, snapshot = forward(engine, long, chain), long.snapshot(0)
    forward(engine, short, chain)  # binds the shape to the few slots that are there at first
    short.restore(0, snapshot)
    assert (forward(engine, short, chain) == wanted).all()


def attention(pad: bool, folder: Path) -> object:
    """A session of one Attention of eight heads of size 64."""
    names = {"query": 8, "keys": 8, "values": 8}
    values = [
        ir.Value(
            name=name, shape=ir.Shape(["B", heads, "T" if name == "query" else "S", 64]), type=ir.TensorType(ir.DataType.FLOAT)
        )
        for name, heads in names.items()
    ]
    values.append(ir.Value(name="mask", shape=ir.Shape(["B", 1, "T", "S"]), type=ir.TensorType(ir.DataType.BOOL)))
    node = ir.node("Attention", values, attributes={"scale": 0.125})
    out = node.outputs[0]
    out.name, out.dtype, out.shape = "out", ir.DataType.FLOAT, ir.Shape(["B", 8, "T", 64])
    model = ir.Model(ir.Graph(values, [out], nodes=[node], opset_imports={"": contract.OPSET}), ir_version=10)
    if pad:
        model, changed = pad_query_rows(model)
        assert changed
    ir.save(model, folder / "attention.onnx")
    return open_session(folder / "attention.onnx", 1)


@pytest.mark.parametrize("pad", [True, False])
def test_one_query_row_takes_another_path_unless_it_is_padded(pad: bool, tmp_path: Path) -> None:
    """Without padding the difference shows, so this can fail; where a later ONNX Runtime has none, the pass can go."""
    session, rng = attention(pad, tmp_path), np.random.default_rng(0)
    query, keys, values = (rng.standard_normal((2, 8, count, 64)).astype(np.float32) for count in (4, 128, 128))
    mask = np.broadcast_to(np.arange(128) < 100, (2, 1, 4, 128))
    feeds = {"keys": keys, "values": values}
    many = session.run(None, feeds | {"query": query, "mask": np.ascontiguousarray(mask)})[0]  # type: ignore[attr-defined]
    one = session.run(  # type: ignore[attr-defined]
        None, feeds | {"query": np.ascontiguousarray(query[:, :, :1]), "mask": np.ascontiguousarray(mask[:, :, :1])}
    )[0]
    assert one.shape == (2, 8, 1, 64) and many.shape == query.shape
    assert (one == many[:, :, :1]).all() == pad

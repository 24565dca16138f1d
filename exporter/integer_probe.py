"""Which integer products this CPU computes exactly, and which of those is fastest: measured with graphs of one product.

Some instruction sets add products of neighbours in 16 bits, which overflows: uint8 by int8 is then wrong for large values, and
no error is raised.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.exporter.graph import save_graph
from headstart.exporter.passes.per_row_int8 import LARGEST, PRODUCTS, ZERO_POINTS, Product, shifted
from headstart.exporter.passes.surgery import MICROSOFT
from headstart.exporter.passes.values import new_initializer
from headstart.runtime.engines.ort_session import open_session
from headstart.runtime.errors import EngineError

SIZE = 1024  # inputs and outputs of the layer that is timed: the hidden size of a small language model
ROWS = (2, 8)  # of a plain step, and of a verify pass or a batch
ROUNDS = 15  # interleaved
INPUT = "rows"  # [M, SIZE], with a default of two rows


@dataclass(frozen=True)
class Probed:
    """The product chosen, and milliseconds of one layer over ROWS, added up; `float_ms` is a float32 layer of that size."""

    product: Product
    product_ms: float
    float_ms: float

    @property
    def settings(self) -> dict[str, str]:
        """What the engine's file keeps; with a note where integers cost more than floats."""
        chosen: dict[str, str] = {"activations": self.product.activations, "weights": self.product.weights}
        if self.product_ms <= self.float_ms:
            return chosen
        factor = self.product_ms / self.float_ms
        return chosen | {"note": f"slower than float32 on this CPU: its 8-bit products take {factor:.1f} times as long"}


def probe_model(product: Product) -> Any:
    """A graph whose output `error` is 0 where this CPU multiplies the largest magnitudes of `product` exactly.

    Its input has a default, so the engine runs it without one; a constant would be multiplied while the session is made.
    """
    kind, largest = product.activations, np.iinfo(product.activations).max
    column = np.resize(np.array([LARGEST, -LARGEST], np.int8), (1, SIZE))
    expected = column.astype(np.float32) * SIZE * (int(largest) - ZERO_POINTS[kind])
    rows = _initializer(INPUT, np.full((ROWS[0], SIZE), largest, kind))
    rows.shape = ir.Shape(["M", SIZE])
    # Equal rows of weights, so that the file stays small; the session multiplies them out once and packs them.
    weights = [_initializer("column", shifted(column, product.weights)), _initializer("sizes", np.array([SIZE, SIZE]))]
    constants = [
        _initializer("one", np.float32(1)),
        _initializer("scales", np.ones(SIZE, np.float32)),
        _initializer("zero_point", np.array(ZERO_POINTS[kind], kind)),
        _initializer("weight_zero_point", np.array(ZERO_POINTS[product.weights], product.weights)),
    ]
    wanted = _initializer("expected", expected)
    weight = ir.node("Expand", weights)
    floats = ir.node("MatMulIntegerToFloat", [rows, weight.outputs[0], *constants], domain=MICROSOFT)
    difference = ir.node("Sub", [floats.outputs[0], wanted])
    distance = ir.node("Abs", difference.outputs)
    worst = ir.node("ReduceMax", distance.outputs, attributes={"keepdims": 0})
    out = worst.outputs[0]
    out.name, out.dtype, out.shape = "error", ir.DataType.FLOAT, ir.Shape(())
    nodes = [weight, floats, difference, distance, worst]
    return _model([rows], out, nodes, [rows, *weights, *constants, wanted], {MICROSOFT: 1})


def float_model() -> Any:
    """A float32 layer of the probe's size."""
    rows = _initializer(INPUT, np.ones((ROWS[0], SIZE), np.float32))
    rows.shape = ir.Shape(["M", SIZE])
    weights = [_initializer("column", np.ones((1, SIZE), np.float32)), _initializer("sizes", np.array([SIZE, SIZE]))]
    weight = ir.node("Expand", weights)
    product = ir.node("MatMul", [rows, weight.outputs[0]])
    out = product.outputs[0]
    out.name, out.dtype, out.shape = "product", ir.DataType.FLOAT, ir.Shape(["M", SIZE])
    return _model([rows], out, [weight, product], [rows, *weights], {})


def fastest_exact(folder: Path) -> Probed:
    """The fastest of PRODUCTS which this CPU computes without overflow; its probe is left in `folder`.

    Raises EngineError where there is none.
    """
    file = folder / "probe.onnx"
    sessions = {}
    for product in PRODUCTS:
        save_graph(probe_model(product), file)
        session = open_session(file, 1)
        if not float(session.run(None, {})[0]):
            sessions[product] = session
    if not sessions:
        raise EngineError("This CPU multiplies no 8-bit integers without overflow. Fix: use the float32 bundle.")
    save_graph(float_model(), file)
    times = _times([*sessions.values(), open_session(file, 1)])
    milliseconds = dict(zip(sessions, times, strict=False))
    fastest = min(milliseconds, key=lambda product: milliseconds[product])
    save_graph(probe_model(fastest), file)
    return Probed(fastest, milliseconds[fastest], times[-1])


def _times(sessions: list[Any]) -> list[float]:
    """Milliseconds of each, added up over ROWS; medians of interleaved rounds."""
    types = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8}
    kinds: list[Any] = [types[session.get_overridable_initializers()[0].type] for session in sessions]
    totals = [0.0] * len(sessions)
    for count in ROWS:
        rows: list[NDArray[Any]] = [np.ones((count, SIZE), kind) for kind in kinds]
        rounds = [[_seconds(session, row) for session, row in zip(sessions, rows, strict=True)] for _ in range(ROUNDS)]
        for index, times in enumerate(zip(*rounds, strict=True)):
            totals[index] += 1e3 * statistics.median(times)
    return totals


def _seconds(session: Any, rows: NDArray[Any]) -> float:
    started = time.perf_counter()
    session.run(None, {INPUT: rows})
    return time.perf_counter() - started


def _model(inputs: list[Any], out: Any, nodes: list[Any], initializers: list[Any], imports: dict[str, int]) -> Any:
    graph = ir.Graph(inputs, [out], nodes=nodes, initializers=initializers, opset_imports={"": 21} | imports, name="probe")
    return ir.Model(graph, ir_version=10)


def _initializer(name: str, array: Any) -> ir.Value:
    return new_initializer(ir.tensor(np.asarray(array), name=name))

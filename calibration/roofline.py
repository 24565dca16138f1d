"""What a pass costs on a device that is not available here: bytes over bandwidth, operations over arithmetic, and launches.

    pass = sqrt((bytes / (bandwidth · memory))² + (operations / rate)²) + layers · launch

- bytes: the weights, read once per pass for any number of rows, and the caches.
- rate: a share of the tensor cores' rate for float16 and for fp4. Integers that are widened to float16 on the way (weight-only
  INT4, INT8) are widened by the CUDA cores, and the published rows follow those cores' rate, not the tensor cores'.
- The two overlap, but not completely: their root of squares lies between maximum and sum.

Four numbers are fitted to `published.ROWS`. The model speaks of relative costs and speed-ups: the absolute speed of a board
differs with its clocks and power mode.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np
from numpy.typing import NDArray

from headstart.exporter.devices import DEVICES, Device
from headstart.runtime.errors import missing_extra

from .published import MODELS, ModelSize, Row

BITS = {"float16": 16.0, "bfloat16": 16.0, "int8": 8.1, "int4": 4.5, "nvfp4": 4.5}  # of a weight, with its share of a scale
WIDENED = ("int4", "int8")
TENSOR_SPEED = {"float16": 1, "bfloat16": 1, "nvfp4": 4}  # times the float16 rate
HEAD_STORAGE = {"int4": "float16", "nvfp4": "nvfp4"}  # how the published rows' LM heads are taken to be stored
TOLERANCE = 0.2  # of a logarithm: larger errors count linearly, so that one odd row does not bias the rest


@dataclass(frozen=True)
class Coefficients:
    """The four fitted numbers.

    Attributes:
        memory: share of the published bandwidth.
        tensor: share of the published dense tensor rate.
        widened: operations with widened weights for each published float32 operation.
        launch_us: microseconds per layer and pass that are neither.
    """

    memory: float
    tensor: float
    widened: float
    launch_us: float


FITTED = Coefficients(0.864, 0.176, 3.959, 110.5)  # to all rows; a test repeats the fit


@dataclass(frozen=True)
class Work:
    """One pass: matrix weights in millions by how they are stored, rows, layers, and bytes that are not weights."""

    weights: Mapping[str, float]
    rows: int
    layers: int
    other_bytes: float = field(default=0.0)


def pass_ms(work: Work, device: Device, fitted: Coefficients = FITTED) -> float:
    """Milliseconds of one pass."""
    weight_bytes = sum(1e6 * millions * BITS[kind] / 8 for kind, millions in work.weights.items())
    memory_s = (weight_bytes + work.other_bytes) / (1e9 * device.bandwidth_gb_s * fitted.memory)
    arithmetic_s = sum(2e6 * m * work.rows / (1e12 * _rate(kind, device, fitted)) for kind, m in work.weights.items())
    return 1e3 * math.hypot(memory_s, arithmetic_s) + work.layers * fitted.launch_us / 1e3


def _rate(kind: str, device: Device, fitted: Coefficients) -> float:
    """10¹² operations per second."""
    if kind in WIDENED:
        return device.float32_tflops * fitted.widened
    return device.float16_tflops * fitted.tensor * TENSOR_SPEED[kind]


def row_ms(row: Row, fitted: Coefficients) -> tuple[float, float]:
    """(a plain step, a speculative round) of a published row."""
    model, device = MODELS[row.model], DEVICES[row.device]

    def cost(body: float, lm_head: float, rows: int, layers: int) -> float:
        weights = {row.weights: body, HEAD_STORAGE[row.weights]: lm_head}
        if row.weights == HEAD_STORAGE[row.weights]:
            weights = {row.weights: body + lm_head}
        return pass_ms(Work(weights, rows * row.batch, layers), device, fitted)

    plain = cost(model.body, model.lm_head, 1, model.layers)
    verified, drafts = RECIPES[row.method]
    body, lm_head, rows, layers = DRAFTERS[row.method](model)
    verify = cost(model.body, model.lm_head, verified, model.layers)
    return plain, verify + drafts * cost(body, lm_head, rows, layers)


# method -> rows verified, passes of the drafter in a round (the published recipes)
RECIPES = {"eagle3": (60, 6), "mtp": (4, 3), "dflash": (16, 1)}
# method -> weights of the drafter's layers, of its LM head, rows and layers of one of its passes
DRAFTERS: dict[str, Callable[[ModelSize], tuple[float, float, int, int]]] = {
    "eagle3": lambda model: (model.eagle_draft, model.eagle_head, 10, 2),
    "mtp": lambda model: (model.mtp_draft, model.lm_head, 1, 2),
    "dflash": lambda model: (model.dflash_draft, model.lm_head, 16, 6),
}


def predicted_speedup(row: Row, fitted: Coefficients) -> float:
    """Of a published row, with its published acceptance length."""
    plain, round_ms = row_ms(row, fitted)
    return row.acceptance * plain / round_ms


def fit(rows: Sequence[Row], start: Coefficients = FITTED) -> Coefficients:
    """Robust least squares over the logarithms of plain steps, rounds and speed-ups. Needs scipy: `headstart[bench]`."""
    try:
        from scipy.optimize import least_squares
    except ModuleNotFoundError as error:
        raise missing_extra(error, "Fitting the cost model") from error

    def errors(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
        coefficients = Coefficients(*np.exp(logarithms).tolist())
        return np.concatenate([_errors(row, coefficients) for row in rows])

    solution = least_squares(errors, np.log(astuple(start)), loss="soft_l1", f_scale=TOLERANCE)
    return Coefficients(*np.exp(solution.x).tolist())


def _errors(row: Row, fitted: Coefficients) -> tuple[float, float, float]:
    """Of the logarithms of a plain step, a round, and twice the speed-up, which is what the model is for."""
    plain, round_ms = row_ms(row, fitted)
    of_plain = math.log(plain * row.plain / (1e3 * row.batch))
    of_round = math.log(round_ms * row.speculative / (1e3 * row.batch * row.acceptance))
    return of_plain, of_round, 2 * (of_round - of_plain)

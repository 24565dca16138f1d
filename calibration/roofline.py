"""What a pass costs on a device that is not at hand: bytes over bandwidth, operations over arithmetic, and launches.

    pass = norm(bytes / (bandwidth · e), operations / (rate · c)) + layers · launch

- `bytes`: the weights, once a pass however many rows, and the caches.
- `rate`: tensor cores for 8 bits and more; 4-bit integers are widened to float16 by the ordinary cores before they are
  multiplied, and the published rows say that this limits them: many rows of INT4 scale with float32, not with tensor cores.
- norm: the two overlap, but not wholly: the p-norm of both with p = 2 lies between their maximum and their sum.

Four numbers are fitted to `published.ROWS`: e, c for each kind of arithmetic, and the launch overhead. The model speaks
of speed-up and of relative costs; absolute speeds are off by what one board differs from the next (clocks, power mode).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from headstart.exporter.devices import DEVICES, Device

from .published import MODELS, ROWS, Row

BITS = {"float16": 16.0, "int8": 8.0, "int4": 4.5, "nvfp4": 4.5}  # with their scales
EAGLE_STEPS, EAGLE_TREE, EAGLE_WIDTH = 6, 60, 10  # the published recipe: 10 candidates, 6 steps, 60 verified
MTP_CHAIN, DFLASH_BLOCK = 4, 16
NORM = 2.0


@dataclass(frozen=True)
class Coefficients:
    """What the fit finds.

    Attributes:
        memory: share of the published bandwidth that weights are read with.
        tensor: share of the published tensor rate.
        widened: INT4 operations per published float32 operation.
        launch_us: microseconds per layer and pass that are neither.
    """

    memory: float
    tensor: float
    widened: float
    launch_us: float


@dataclass(frozen=True)
class Work:
    """One pass: weights in millions by storage, rows, layers, and bytes that are not weights."""

    weights: dict[str, float]
    rows: int
    layers: int
    other_bytes: float = 0.0


def pass_ms(work: Work, device: Device, fitted: Coefficients) -> float:
    """Milliseconds of one pass."""
    total_bytes = work.other_bytes + sum(millions * 1e6 * BITS[kind] / 8 for kind, millions in work.weights.items())
    memory_ms = 1e3 * total_bytes / (1e9 * device.bandwidth_gb_s * fitted.memory)
    arithmetic_ms = sum(
        1e3 * 2e6 * millions * work.rows / (1e12 * _rate(kind, device, fitted)) for kind, millions in work.weights.items()
    )
    return math.hypot(memory_ms, arithmetic_ms) + work.layers * fitted.launch_us / 1e3


def _rate(kind: str, device: Device, fitted: Coefficients) -> float:
    """10¹² operations per second."""
    if kind == "int4":
        return device.float32_tflops * fitted.widened
    return device.float16_tflops * fitted.tensor * (4 if kind == "nvfp4" else 1)

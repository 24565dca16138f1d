"""Boards and GPUs by name: what a memory plan and a cost model need to know of them, and where each figure is published.

Figures are the makers' own: capacity and bandwidth of the memory, and dense tensor-core rates. Where a data sheet gives the
sparse 8-bit rate alone, the dense float16 rate is a quarter of it, as in every generation from Ampere on (half for dense, half
again for the wider type); for Jetson it is the GPU's share, without the DLA, at the highest clocks (JetPack 6.2's "Super"
modes on Orin Nano and NX). Nothing here was measured by us.

Held against a second publication each: Orin Nano 8 GB (67 sparse int8 TOPS, 1.02 GHz, 102 GB/s), AGX Orin 64 GB (170 sparse,
5.3 float32), Thor (2,560 cores, 2,070 sparse 4-bit), Spark (273 GB/s, 29.7 float32), and the bandwidths of T4, RTX 3090, 4090
and 5090; the others were not.
"""

from dataclasses import dataclass

from headstart.runtime.errors import OptionError

JETSON_ORIN = (
    "NVIDIA Jetson Orin modules, technical specifications: nvidia.com, autonomous machines, embedded systems, jetson-orin"
)
JETSON_THOR = (
    "NVIDIA Jetson Thor modules, technical specifications: nvidia.com, autonomous machines, embedded systems, jetson-thor"
)
SPARK = "NVIDIA DGX Spark, hardware overview: docs.nvidia.com/dgx/dgx-spark/hardware.html"
ADA = "NVIDIA Ada GPU architecture white paper, appendix A"
AMPERE = "NVIDIA Ampere GA102 GPU architecture white paper, appendix"
BLACKWELL = "NVIDIA RTX Blackwell GPU architecture white paper, appendix"
TURING = "NVIDIA T4 data sheet"
HALF = ("float16", "bfloat16", "int8", "int4")


@dataclass(frozen=True)
class Device:
    """One board or GPU.

    Attributes:
        generation: compute capability, as sm87.
        memory_gb: of 10⁹ bytes; on Jetson and Spark shared with the CPU and the system.
        bandwidth_gb_s: of that memory.
        float16_tflops: dense, on tensor cores.
        float32_tflops: on the ordinary cores: twice their number times the highest clock.
        precisions: weights and activations its tensor cores take, or that kernels widen on the way.
        shared: CPU and GPU use one memory.
        source: where the maker publishes the figures.
    """

    name: str
    generation: str
    memory_gb: float
    bandwidth_gb_s: float
    float16_tflops: float
    float32_tflops: float
    precisions: tuple[str, ...]
    shared: bool
    source: str

    @property
    def target(self) -> str:
        """What `headstart build --device` is told for it."""
        return "tensorrt" if self.generation in ("sm87", "sm110") else f"trt-rtx:{self.generation}"


FP8 = (*HALF, "fp8")
FP4 = (*FP8, "fp4")
_TABLE = (
    Device("jetson-orin-nano-4gb", "sm87", 4, 51, 8.5, 1.04, HALF, True, JETSON_ORIN),
    Device("jetson-orin-nano-8gb", "sm87", 8, 102, 16.75, 2.09, HALF, True, JETSON_ORIN),
    Device("jetson-orin-nx-8gb", "sm87", 8, 102.4, 19, 2.4, HALF, True, JETSON_ORIN),
    Device("jetson-orin-nx-16gb", "sm87", 16, 102.4, 19, 2.4, HALF, True, JETSON_ORIN),
    Device("jetson-agx-orin-32gb", "sm87", 32, 204.8, 27, 3.33, HALF, True, JETSON_ORIN),
    Device("jetson-agx-orin-64gb", "sm87", 64, 204.8, 42.5, 5.33, HALF, True, JETSON_ORIN),
    Device("jetson-thor", "sm110", 128, 273, 258, 8.06, FP4, True, JETSON_THOR),
    Device("dgx-spark", "sm121", 128, 273, 125, 29.7, FP4, True, SPARK),
    Device("tesla-t4", "sm75", 16, 320, 65, 8.1, ("float16", "int8"), False, TURING),
    Device("rtx-3060-12gb", "sm86", 12, 360, 51, 12.7, HALF, False, AMPERE),
    Device("rtx-3090", "sm86", 24, 936, 142, 35.6, HALF, False, AMPERE),
    Device("rtx-4060", "sm89", 8, 272, 60, 15.1, FP8, False, ADA),
    Device("rtx-4090", "sm89", 24, 1008, 330.3, 82.6, FP8, False, ADA),
    Device("rtx-5090", "sm120", 32, 1792, 419, 104.8, FP4, False, BLACKWELL),
)
DEVICES = {device.name: device for device in _TABLE}


def device_named(name: str) -> Device:
    """Raises OptionError, which lists the known names, for an unknown one."""
    if name not in DEVICES:
        raise OptionError(f"the board {name!r} is unknown. Known: {', '.join(DEVICES)}.")
    return DEVICES[name]

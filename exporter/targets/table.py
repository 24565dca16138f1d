"""TARGETS: one row per device that a bundle can be built for. Adding a device is one file here and one line in this table.

The runtime's half of each row is in `headstart.runtime.engines.registry`, under the same name.
"""

from typing import Any

from headstart.runtime.engines.registry import device_kind

from .cpu import CpuTarget
from .cuda import CudaTarget
from .target import Target
from .tensorrt import TensorRtTarget

TARGETS: dict[str, type[Target[Any, Any]]] = {
    "cpu": CpuTarget,
    "cuda": CudaTarget,
    "trt-rtx": TensorRtTarget,
    "tensorrt": TensorRtTarget,
}


def target_for(device: str) -> type[Target[Any, Any]]:
    """The row for a device as the user writes it: cpu, cuda, trt-rtx:sm89, tensorrt. Raises OptionError for an unknown one."""
    return TARGETS[device_kind(device)]

"""ENGINES: one row per device that bundles decode on. Adding a device is one engine and one line in this table.

The exporter's half of each row, which builds for the device, is in `headstart.exporter.targets.table`, under the same name.
"""

from collections.abc import Callable
from dataclasses import dataclass

from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import OptionError

from .ort_engine import OnnxRuntimeEngine
from .trt_engine import TensorRtEngine

BuiltEngine = OnnxRuntimeEngine | TensorRtEngine


@dataclass(frozen=True)
class Row:
    """How a bundle is opened on one kind of device.

    Attributes:
        open: (bundle, device as the user wrote it, threads or None for all) -> engine. Raises EngineError when nothing was
            built for the device, when that is stale, or when the device is not there; MissingExtraError without its library.
        spelling: how users write the device, for messages.
        variants: what may follow the name after a colon; None where the device itself decides.
    """

    open: Callable[[Bundle, str, int | None], BuiltEngine]
    spelling: str
    variants: tuple[str, ...] | None = ()


def _open_onnxruntime(bundle: Bundle, device: str, threads: int | None) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine.open(bundle, threads, device)


def _open_tensorrt(bundle: Bundle, device: str, threads: int | None) -> TensorRtEngine:
    """`threads` are the CPU's, which only starts the GPU's work."""
    return TensorRtEngine.open(bundle, device)


ENGINES = {
    "cpu": Row(_open_onnxruntime, "cpu"),
    "cuda": Row(_open_onnxruntime, "cuda (decoding also takes cuda:tensorrt)", ("tensorrt",)),
    "trt-rtx": Row(_open_tensorrt, "trt-rtx:sm89 (or sm75, sm80, sm86, sm120, sm121, or several of them)", None),
    "tensorrt": Row(_open_tensorrt, "tensorrt", None),
}


def device_kind(device: str) -> str:
    """The row's name of a device as users write it: "trt-rtx" of trt-rtx:sm89. Raises OptionError for an unknown device."""
    kind, colon, variant = device.partition(":")
    row = ENGINES.get(kind)
    if row is None or (colon and row.variants is not None and variant not in row.variants):
        known = ", ".join(one.spelling for one in ENGINES.values())
        raise OptionError(f"device {device!r} is unknown. Choose one of: {known}.")
    return kind


def open_engine(bundle: Bundle, device: str = "cpu", threads: int | None = None) -> BuiltEngine:
    """A bundle's graphs made ready for `device`, as they were built for it; for cpu, else the canonical graphs.

    Raises OptionError for an unknown device, and as the rows say.
    """
    return ENGINES[device_kind(device)].open(bundle, device, threads)

"""Headstart: a Hugging Face checkpoint with draft heads, decoding fast and losslessly on the edge.

    import headstart
    model = headstart.load("bundle")
    print(model.generate("def fib(n):", max_new_tokens=64).text)

Names are loaded on first use, so that importing the package costs nothing and never needs an optional package.
"""

import importlib
from typing import TYPE_CHECKING, Any

from headstart.runtime.errors import missing_extra

if TYPE_CHECKING:
    from headstart.calibration.bench import bench
    from headstart.calibration.quantize import QuantizeOptions, quantize
    from headstart.calibration.quantized_heads import import_head
    from headstart.calibration.report import compare
    from headstart.calibration.train import train_heads
    from headstart.calibration.tune import TuneOptions, tune
    from headstart.calibration.verify import verify
    from headstart.exporter.build import build
    from headstart.exporter.export import export
    from headstart.runtime.bundle import Bundle
    from headstart.runtime.errors import HeadstartError
    from headstart.runtime.loading import load
    from headstart.runtime.model import Model
    from headstart.runtime.options import DecodeOptions, GenerateOptions
    from headstart.runtime.results import Result, Stats
    from headstart.runtime.segments import Segment
    from headstart.runtime.transcription import Caption, Transcript

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "headstart.runtime.bundle",
    "Caption": "headstart.runtime.transcription",
    "DecodeOptions": "headstart.runtime.options",
    "GenerateOptions": "headstart.runtime.options",
    "HeadstartError": "headstart.runtime.errors",
    "Model": "headstart.runtime.model",
    "QuantizeOptions": "headstart.calibration.quantize",
    "Result": "headstart.runtime.results",
    "Segment": "headstart.runtime.segments",
    "Stats": "headstart.runtime.results",
    "Transcript": "headstart.runtime.transcription",
    "TuneOptions": "headstart.calibration.tune",
    "bench": "headstart.calibration.bench",
    "build": "headstart.exporter.build",
    "compare": "headstart.calibration.report",
    "export": "headstart.exporter.export",
    "import_head": "headstart.calibration.quantized_heads",
    "load": "headstart.runtime.loading",
    "quantize": "headstart.calibration.quantize",
    "train_heads": "headstart.calibration.train",
    "tune": "headstart.calibration.tune",
    "verify": "headstart.calibration.verify",
}

__all__ = [
    "Bundle",
    "Caption",
    "DecodeOptions",
    "GenerateOptions",
    "HeadstartError",
    "Model",
    "QuantizeOptions",
    "Result",
    "Segment",
    "Stats",
    "Transcript",
    "TuneOptions",
    "bench",
    "build",
    "compare",
    "export",
    "import_head",
    "load",
    "quantize",
    "train_heads",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headstart' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        raise missing_extra(error, f"headstart.{name}") from error


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

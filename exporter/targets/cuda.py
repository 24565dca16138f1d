"""The target `cuda`: ONNX Runtime's CUDA provider, in half precision.

Neither a GPU nor onnxruntime-gpu is needed to build: every node is checked against the table of the provider's kernels, and
float16 engines are compared with the canonical graphs on the CPU provider, which has no kernels for bfloat16.
"""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from headstart.exporter.graph import save_beside, save_graph
from headstart.exporter.lowering.cache_moves import commit_graph, gather_graph
from headstart.exporter.lowering.cuda import PRECISIONS, Lowered, lower
from headstart.exporter.lowering.placement import left_on_cpu, registry
from headstart.exporter.overflow import float16_overflows
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import EngineError, OptionError

from .target import Form, Progress, Target

ON_HOST = ("frontend",)  # a few operations once a recording, in float32: the runtime leaves them on the CPU


@dataclass(frozen=True)
class CudaOptions:
    """What is chosen when a bundle is built for ONNX Runtime's CUDA provider.

    Attributes:
        precision: float16 or bfloat16, of a float32 bundle; one exported in half precision keeps its own.
    """

    precision: str = "float16"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise OptionError(f"--precision {self.precision!r} is unknown. Choose one of: {', '.join(PRECISIONS)}.")


class CudaTarget(Target[CudaOptions, Lowered]):
    """One form of each graph for any batch, and two small graphs that move cache slots on the device."""

    options_type = CudaOptions
    packages = ("headstart", "onnx", "onnx-ir", "onnxscript")

    def __init__(self, bundle: Bundle, device: str, folder: Path, options: CudaOptions, progress: Progress) -> None:
        super().__init__(bundle, device, folder, options, progress)
        own = bundle.manifest.model.dtype
        self.precision = options.precision if own == "float32" else own
        self.settings = {"precision": self.precision, "kernels checked": f"onnxruntime-gpu {registry()[0]}"}
        self.overflows = float16_overflows(bundle, self.precision, progress)

    @classmethod
    def device_name(cls, device: str) -> str:
        if device != "cuda":
            raise OptionError(f"device {device!r} is none that bundles are built for. Fix: --device cuda, which serves both.")
        return device

    def lower(self, name: str, model: ir.Model) -> Lowered:
        if name in ON_HOST:
            return Lowered(model, {})
        lowered = lower(model, self.precision, self.overflows.get(name, ()))
        left = left_on_cpu(lowered.model)
        if left:
            raise EngineError(
                f"The CUDA provider of ONNX Runtime {registry()[0]} has no kernel for {len(left)} nodes of {name}, which "
                f"would run on the CPU in every step: {'; '.join(left[:5])}. Fix: --device cpu or tensorrt; and report this."
            )
        return lowered

    def write(self, name: str, lowered: Lowered) -> None:
        self.precisions[name] = "float32" if name in ON_HOST else self.precision
        if name == "decoder":
            self.passes = lowered.passes
            self._save("commit", commit_graph(lowered.model))
            self._save("gather", gather_graph(lowered.model))
        self._save(name, lowered.model)

    def _save(self, name: str, model: ir.Model) -> None:
        self.graphs[name] = f"{name}.onnx"
        file = self.folder / self.graphs[name]
        if name == "encoder":  # weights that both use are stored with the decoder's
            save_beside(model, file, self.folder / self.graphs["decoder"])
        else:
            save_graph(model, file)

    def forms(self, name: str) -> tuple[Form, ...]:
        if self.precision != "float16":
            return ()
        file = self.folder / self.graphs[name]
        return (Form(file), Form(file, batch=2)) if name == "decoder" else (Form(file),)

"""The target `cpu`: ONNX Runtime's CPU provider, in float32 or with integer products."""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from headstart.exporter.graph import save_beside, save_graph
from headstart.exporter.integer_probe import fastest_exact
from headstart.exporter.lowering.cpu import Lowered, lower_decoder, lower_graph
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import LM_HEAD
from headstart.runtime.engines.ort_session import onnxruntime_version
from headstart.runtime.errors import EngineError
from headstart.runtime.precision import precision_of

from .target import Form, Progress, Target, is_shortlist


@dataclass(frozen=True)
class CpuOptions:
    """The CPU's build has no options: what it needs to know, it measures."""


class CpuTarget(Target[CpuOptions, Lowered | ir.Model]):
    """Two forms of the decoder over one file of weights, and every other graph in one form."""

    options_type = CpuOptions

    def __init__(self, bundle: Bundle, device: str, folder: Path, options: CpuOptions, progress: Progress) -> None:
        super().__init__(bundle, device, folder, options, progress)
        dtype = bundle.manifest.model.dtype
        if dtype != "float32":
            raise EngineError(
                f"{bundle.path} computes in {dtype}, and the cpu device in float32. "
                "Fix: headstart export --dtype float32 (weights may then be quantized)."
            )
        self.versions = {"onnxruntime": onnxruntime_version()}
        progress("probing the CPU's integer products")
        self.probed = fastest_exact(folder)
        self.graphs["probe"] = "probe.onnx"

    def runs(self, name: str) -> bool:
        return True

    @property
    def _has_shortlist(self) -> bool:
        """Tokens may be decided provisionally, and the LM head run later."""
        return any(is_shortlist(self.bundle, name) for name in self.bundle.graphs)

    def lower(self, name: str, model: ir.Model) -> Lowered | ir.Model:
        if name == "decoder":
            positions, apart = self.bundle.manifest.model.max_cache, self._has_shortlist
            return lower_decoder(model, positions, self.probed.product, apart)
        return lower_graph(model, self.probed.product)

    def write(self, name: str, lowered: Lowered | ir.Model) -> None:
        file, decoder = self.folder / f"{name}.onnx", self.folder / "decoder.onnx"
        self.graphs[name] = f"{name}.onnx"
        self.precisions[name] = self._precision(lowered.single if isinstance(lowered, Lowered) else lowered)
        if self.precisions[name] != "float32":
            self.settings = self.probed.settings
        if isinstance(lowered, Lowered):
            save_graph(lowered.single, file)
            save_beside(lowered.batch, self.folder / "decoder_batch.onnx", file)
            self.graphs["decoder_batch"], self.passes = "decoder_batch.onnx", lowered.passes
            if lowered.lm_head is not None:  # a tied embedding table is stored with the decoder
                self.graphs[LM_HEAD] = f"{LM_HEAD}.onnx"
                save_beside(lowered.lm_head, self.folder / self.graphs[LM_HEAD], file)
        elif name == "encoder":  # weights that both use are stored with the decoder's
            save_beside(lowered, file, decoder)
        else:
            save_graph(lowered, file)

    def _precision(self, model: ir.Model) -> str:
        integers = any(node.op_type == "MatMulIntegerToFloat" for node in model.graph)
        return precision_of("float32", integers, self.bundle.manifest.quantization.get("weights", ""))

    def forms(self, name: str) -> tuple[Form, ...]:
        file = self.folder / self.graphs[name]
        if name == "decoder":
            lm_head = self.folder / self.graphs[LM_HEAD] if LM_HEAD in self.graphs else None
            batch = self.folder / self.graphs["decoder_batch"]
            return Form(file, lm_head=lm_head), Form(batch, batch=2, lm_head=lm_head)
        return (Form(file),)

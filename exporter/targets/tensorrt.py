"""The targets `trt-rtx` and `tensorrt`: one plan per graph, built by TensorRT for RTX or by classic TensorRT.

Plans for RTX are built on any machine and run only on their GPUs, so nothing is compared here.
"""

import dataclasses
from pathlib import Path

import onnx_ir as ir

from headstart.exporter.graph import save_graph
from headstart.exporter.lowering.tensorrt import Lowered, lower, lower_frontend
from headstart.exporter.memory_plan import check_fits
from headstart.exporter.overflow import float16_overflows
from headstart.exporter.tensorrt.builder import build_plan
from headstart.exporter.tensorrt.library import open_library, parse_target
from headstart.exporter.tensorrt.options import TensorRtOptions
from headstart.exporter.tensorrt.origin import source_module
from headstart.exporter.tensorrt.profiles import decoder_profiles, head_profiles
from headstart.exporter.tensorrt.recordings import encoder_profiles, frontend_profiles
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import Profile
from headstart.runtime.errors import EngineError

from .target import Form, Progress, Target


class TensorRtTarget(Target[TensorRtOptions, Lowered]):
    """Every graph as a plan of fixed sizes."""

    options_type = TensorRtOptions
    packages = ("headstart", "onnx", "onnx-ir", "onnxscript")

    def __init__(self, bundle: Bundle, device: str, folder: Path, options: TensorRtOptions, progress: Progress) -> None:
        super().__init__(bundle, device, folder, options, progress)
        if options.fits is not None:
            check_fits(bundle, options.fits, options)
        _check_caches(bundle)
        self.library = open_library(parse_target(device))
        self.versions = {self.library.module.__name__: self.library.version}
        own = bundle.manifest.model.dtype
        self.precision = options.precision if own == "float32" else own
        self.settings = self._settings()
        self.library.check_types(self.settings.values())
        self.cache_slots, self.batch = options.slots(bundle), options.batch
        self.source_rows = options.source_rows(bundle) if "encoder" in bundle.manifest.graphs else 0
        self.sizes = {"batch": 1, "slots": self.cache_slots} | ({"source": self.source_rows} if self.source_rows else {})
        self.overflows = float16_overflows(bundle, self.precision, progress)

    @classmethod
    def device_name(cls, device: str) -> str:
        return parse_target(device).device

    def _settings(self) -> dict[str, str]:
        weights = self.bundle.manifest.quantization.get("weights", "as exported")
        chosen = {name: value for name, value in dataclasses.asdict(self.options.builder).items() if value not in (None, False)}
        return {"precision": self.precision, "weights": weights} | {
            name: str(value) for name, value in chosen.items() if name != "timing_cache"
        }

    def lower(self, name: str, model: ir.Model) -> Lowered:
        if name == "frontend":
            return lower_frontend(model, self.sizes, self.library.native)
        # Where several sequences are decoded together, any number of them up to that, as in the profiles.
        open_batch = self.batch > 1 and name != "encoder"
        sizes = {axis: size for axis, size in self.sizes.items() if axis != "batch" or not open_batch}
        return lower(model, self.precision, sizes, self.library.native, self.overflows.get(name, ()))

    def write(self, name: str, lowered: Lowered) -> None:
        """Write the graph for the parser, build its plan, and keep the graph only where a stripped plan needs its weights."""
        file = self.folder / f"{name}.onnx"
        save_graph(lowered.model, file)
        inputs = lowered.model.graph.inputs
        axes = {str(v.name): [a if isinstance(a, int) else str(a.value) for a in v.shape or ()] for v in inputs}
        if name == "decoder":
            self.passes = lowered.passes
        _drop_weights(lowered.model)  # they are in the file now, and the builder needs the memory
        info = build_plan(
            file,
            axes,
            self._profiles(name),
            self.library,
            self.options.builder,
            lambda stage: self.progress(f"building {name}: {stage}"),
            lambda node: source_module(file, node),
        )
        self.graphs[name] = f"{name}.plan"
        self.plans[name] = dataclasses.replace(
            info, float32_layers=lowered.float32_layers, decomposed_attention=lowered.decomposed_attention
        )
        if not self.options.builder.strip_weights:
            file.unlink()
            file.with_name(f"{file.name}.data").unlink(missing_ok=True)

    def _profiles(self, name: str) -> tuple[Profile, ...]:
        options, bundle = self.options, self.bundle
        if name == "decoder":
            return decoder_profiles(min(options.prefill_rows, options.tokens(bundle)), options.batch)
        if name == "encoder":
            return encoder_profiles(bundle, options.audio_seconds)
        return frontend_profiles(bundle, options.audio_seconds) if name == "frontend" else head_profiles(options.batch)

    def forms(self, name: str) -> tuple[Form, ...]:
        return ()


def _drop_weights(model: ir.Model) -> None:
    for weight in model.graph.initializers.values():
        weight.const_value = None


def _check_caches(bundle: Bundle) -> None:
    """TensorRT's cache update takes floats only (TensorRT-RTX 1.7.1: its parser refuses TensorScatter on int8)."""
    if any(slots.dtype == "int8" for slots in bundle.manifest.graphs["decoder"].slots):
        raise EngineError(
            f"{bundle.path} keeps its cache in int8, which TensorRT cannot update in place. "
            "Fix: headstart quantize without --kv-cache int8."
        )

"""A bundle's engine for ONNX Runtime's CUDA provider: lowered graphs, checked against its kernels and, where the CPU provider
can run them, against the canonical ones. Neither a GPU nor onnxruntime-gpu is needed to build it.
"""

import datetime
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import ENGINE_SCHEMA, EngineInfo, engine_source
from headstart.runtime.errors import EngineError

NOT_RUN = -1.0  # what `relative_difference` is then


def build_cuda(bundle: Bundle, folder: Path, precision: str, progress: Callable[[str], None]) -> EngineInfo:
    """Lower every graph into `folder`. `precision`: float16 or bfloat16; a bundle exported in half precision keeps its own.

    Raises EngineError for a node without a CUDA kernel, or values that half precision cannot carry.
    """
    own = bundle.manifest.model.dtype
    made = _Building(bundle, folder, precision if own == "float32" else own, progress)
    made.decoder()
    if "encoder" in bundle.manifest.graphs:
        made.encoder()
    for name in bundle.manifest.heads:
        made.head(name)
    return made.info()


class _Building:
    """One build: what was lowered so far."""

    def __init__(self, bundle: Bundle, folder: Path, precision: str, progress: Callable[[str], None]) -> None:
        self.bundle, self.folder, self.precision, self.progress = bundle, folder, precision, progress
        self.graphs: dict[str, str] = {}
        self.passes: dict[str, int] = {}
        self.overflows = self._overflows()

    def decoder(self) -> None:
        from .lowering.cache_moves import commit_graph, gather_graph

        model = self._lowered("decoder", self._load("decoder"))
        for name, moves in (("commit", commit_graph(model)), ("gather", gather_graph(model))):
            self._save(name, moves)
        self._save("decoder", model)

    def encoder(self) -> None:
        from .graph import save_beside

        model = self._lowered("encoder", self._load("encoder"))
        save_beside(model, self.folder / "encoder.onnx", self.folder / "decoder.onnx")
        self.graphs["encoder"] = "encoder.onnx"

    def head(self, name: str) -> None:
        from .heads.storage import load_head

        self._save(f"heads/{name}", self._lowered(f"heads/{name}", load_head(self.bundle, name)))

    def info(self) -> EngineInfo:
        """Of what was built; nothing was compared yet."""
        from .lowering.placement import registry

        return EngineInfo(
            schema_version=ENGINE_SCHEMA,
            device="cuda",
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            builder={name: importlib.metadata.version(name) for name in ("headstart", "onnx", "onnx-ir", "onnxscript")},
            source=engine_source(self.bundle),
            graphs=self.graphs,
            settings={"precision": self.precision, "kernels checked": f"onnxruntime-gpu {registry()[0]}"},
            passes=self.passes,
            relative_difference=NOT_RUN,
        )

    def _load(self, graph: str) -> Any:
        import onnx_ir as ir

        return ir.load(self.bundle.path / self.bundle.manifest.graphs[graph].file)

    def _lowered(self, name: str, model: Any) -> Any:
        from .lowering.cuda import lower
        from .lowering.placement import left_on_cpu, registry

        self.progress(f"lowering {name}")
        lowered = lower(model, self.precision, self.overflows.get(name, ()))
        left = left_on_cpu(lowered.model)
        if left:
            raise EngineError(
                f"The CUDA provider of ONNX Runtime {registry()[0]} has no kernel for {len(left)} nodes of {name}, which "
                f"would run on the CPU in every step: {'; '.join(left[:5])}. Fix: --device cpu or tensorrt; and report this."
            )
        self.passes = self.passes or lowered.passes
        return lowered.model

    def _save(self, name: str, model: Any) -> None:
        from .graph import save_graph

        self.graphs[name] = f"{name}.onnx"
        save_graph(model, self.folder / self.graphs[name])

    def _overflows(self) -> dict[str, tuple[str, ...]]:
        """What float16 cannot hold: as the bundle says, or else found now."""
        manifest = self.bundle.manifest
        if manifest.overflows or manifest.model.dtype != "float32" or self.precision != "float16":
            return manifest.overflows
        from .overflow import overflowing

        self.progress("looking for values beyond float16's range")
        return overflowing(self.bundle.path, manifest)

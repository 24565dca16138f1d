"""Bundle to engine: every canonical graph lowered for one device, compared with the original, and written in place.

Knows no device: each is a row of `targets.table.TARGETS`. Needs onnx_ir and the device's own builder; neither torch nor the
checkpoint.
"""

import datetime
import gc
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headstart.runtime.bundle import Bundle
from headstart.runtime.documents import to_json
from headstart.runtime.engines.info import ENGINE_FILE, ENGINE_SCHEMA, EngineInfo, engine_folder, engine_source
from headstart.runtime.errors import OptionError, missing_extra
from headstart.runtime.memory import peak_memory_mb
from headstart.runtime.output import atomic_write, hash_files, new_folder

from . import canonical
from .check import check_graphs
from .float_agreement import float_agreement, warn_if_poor
from .targets.cpu import CpuOptions
from .targets.cuda import CudaOptions
from .targets.table import target_for
from .targets.target import Target
from .tensorrt.options import TensorRtOptions

Progress = Callable[[str], None]
BuildOptions = CpuOptions | CudaOptions | TensorRtOptions


def build(
    bundle: str | Path,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = lambda stage: None,
    options: BuildOptions | None = None,
) -> EngineInfo:
    """Prepare a bundle for one device; the engine is written to `engines/<device>` inside the bundle.

    Args:
        device: cpu, cuda, trt-rtx:sm89 (or several generations, trt-rtx:sm86,sm120), or tensorrt.
        force: replace an engine that is there.
        progress: called with the name of each stage as it begins.
        options: the device's own: CpuOptions, CudaOptions or TensorRtOptions; its defaults where None.

    Raises OptionError for an unknown device or another device's options, OutputError when it is built already (unless `force`),
    MissingExtraError without the device's builder, EngineError when a lowered graph does not compute what the canonical one
    does, or the builder refuses it. Nothing is written then.
    """
    opened = Bundle.load(bundle)
    row = target_for(device)
    device = row.device_name(device)
    options = _checked(options, row, device)
    with new_folder(engine_folder(opened, device), force) as folder:
        try:
            info = _built(row(opened, device, folder, options, progress))
        except ModuleNotFoundError as error:
            raise missing_extra(error, "Building an engine") from error
        atomic_write(folder / ENGINE_FILE, to_json(info))
    return info


def _checked(options: BuildOptions | None, row: type[Target[Any, Any]], device: str) -> Any:
    """The options, or the device's defaults. Raises OptionError for those of another device."""
    if options is None:
        return row.options_type()
    if not isinstance(options, row.options_type):
        wanted = row.options_type.__name__
        raise OptionError(f"device {device!r} takes {wanted}, got {type(options).__name__}. Fix: options={wanted}(…).")
    return options


def _built(target: Target[Any, Any]) -> EngineInfo:
    """Lower, write and compare every graph."""
    bundle = target.bundle
    for name in filter(target.runs, bundle.graphs):
        target.progress(f"lowering {name}")
        target.write(name, target.lower(name, canonical.load_graph(bundle, name)))
        gc.collect()  # a graph's nodes and values refer to each other, and would keep its weights in memory
    differences = check_graphs(bundle, target)
    agreement = float_agreement(target)
    warn_if_poor(bundle.manifest.quantization.get("weights", ""), agreement)
    return EngineInfo(
        schema_version=ENGINE_SCHEMA,
        device=target.device,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        builder=target.versions | {name: importlib.metadata.version(name) for name in target.packages},
        source=engine_source(bundle),
        graphs=target.graphs,
        settings=target.settings,
        passes=target.passes,
        relative_difference=differences["decoder"].largest if differences else None,
        differences=differences,
        float_agreement=agreement,
        plans=target.plans,
        cache_slots=target.cache_slots,
        batch=target.batch,
        source_rows=target.source_rows,
        peak_memory_mb=peak_memory_mb(),
        files=hash_files(target.folder),
    )

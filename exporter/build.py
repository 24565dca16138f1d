"""Bundle to engine: lower the canonical graphs for one device, prove them against the originals, write them in place.

Needs onnx_ir and the device's own runtime; neither torch nor the checkpoint.
"""

import dataclasses
import datetime
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.bundle import GOLDEN, Bundle
from headstart.runtime.documents import to_json
from headstart.runtime.engines.info import ENGINE_FILE, ENGINE_SCHEMA, EngineInfo, engine_folder, engine_source
from headstart.runtime.engines.onnxruntime import OnnxRuntimeEngine
from headstart.runtime.engines.provider import AS_WRITTEN, CPU, Provider
from headstart.runtime.errors import EngineError, OptionError, missing_extra
from headstart.runtime.output import atomic_write, hash_files, new_folder
from headstart.runtime.tree import ROOT, DraftTree

from .cuda import build_cuda
from .tensorrt.build import TensorRtOptions, build_tensorrt
from .tensorrt.library import is_target, parse_target

Progress = Callable[[str], None]
DEVICES = ("cpu", "cuda", "trt-rtx:sm89 (or sm75, sm80, sm86, sm120, sm121, or several of them)", "tensorrt")
# Largest |Δlogit| of the lowered graph against the canonical one, over the logits' range. Integer products round the
# activations to 8 bits, half precision all numbers to 11; everything else only changes the order of summation.
LIMITS = {"float": 1e-4, "half": 0.05, "integer": 0.3}


def build(
    bundle: str | Path,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = lambda stage: None,
    options: TensorRtOptions | None = None,
) -> EngineInfo:
    """Make a bundle ready for one device; the engine goes to `engines/<device>` inside the bundle.

    `device`: cpu, cuda, trt-rtx:sm89 (or several generations, trt-rtx:sm86,sm120), or tensorrt. `options` are for TensorRT; of
    them, cuda takes the precision.

    Raises OptionError for an unknown device, OutputError when it is built already (unless `force`), MissingExtraError without
    the device's builder, EngineError when the lowered graphs do not compute what the canonical ones do, or the builder refuses
    them. Nothing is left behind then.
    """
    opened = Bundle.load(bundle)
    if is_target(device):
        device = parse_target(device).device
    elif device not in ("cpu", "cuda"):
        raise OptionError(f"device {device!r} is unknown. Choose one of: {', '.join(DEVICES)}.")
    elif device == "cpu" and opened.manifest.model.dtype != "float32":
        raise EngineError(
            f"{opened.path} computes in {opened.manifest.model.dtype}, and the cpu device in float32. "
            "Fix: headstart export --dtype float32 (weights may then be quantized)."
        )
    with new_folder(engine_folder(opened, device), force) as folder:
        try:
            if device == "cpu":
                info = _build_cpu(opened, folder, progress)
            elif device == "cuda":
                info = _build_cuda(opened, folder, (options or TensorRtOptions()).precision, progress)
            else:
                info = build_tensorrt(opened, device, folder, options or TensorRtOptions(), progress)
        except ModuleNotFoundError as error:
            raise missing_extra(error, "Building an engine") from error
        info = dataclasses.replace(info, files=hash_files(folder))
        atomic_write(folder / ENGINE_FILE, to_json(info))
    return info


def _build_cpu(bundle: Bundle, folder: Path, progress: Progress) -> EngineInfo:
    import onnx_ir as ir

    from .graph import save_beside, save_graph
    from .heads.storage import load_head
    from .integer_probe import fastest_exact
    from .lowering.cpu import lower_decoder, lower_graph

    progress("probing the CPU's integer products")
    probed = fastest_exact(folder)
    product = probed.product
    progress("lowering the decoder")
    manifest = bundle.manifest
    decoder = ir.load(bundle.path / manifest.graphs["decoder"].file)
    lowered = lower_decoder(decoder, manifest.model.max_cache, product)
    save_graph(lowered.single, folder / "decoder.onnx")
    save_beside(lowered.batch, folder / "decoder_batch.onnx", folder / "decoder.onnx")
    graphs = {"decoder": "decoder.onnx", "decoder_batch": "decoder_batch.onnx", "probe": "probe.onnx"}
    if "encoder" in manifest.graphs:
        progress("lowering the encoder")
        encoder = lower_graph(ir.load(bundle.path / manifest.graphs["encoder"].file), product)
        save_beside(encoder, folder / "encoder.onnx", folder / "decoder.onnx")
        graphs["encoder"] = "encoder.onnx"
    for name in manifest.heads:
        progress(f"lowering the head {name}")
        save_graph(lower_graph(load_head(bundle, name), product), folder / "heads" / f"{name}.onnx")
        graphs[f"heads/{name}"] = f"heads/{name}.onnx"
    info = EngineInfo(
        schema_version=ENGINE_SCHEMA,
        device="cpu",
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        builder=builder_versions("headstart", "onnx-ir", "onnxscript"),
        source=engine_source(bundle),
        graphs=graphs,
        settings=probed.settings if lowered.passes["integer_products"] else {},
        passes=lowered.passes,
    )
    progress("comparing with the canonical graph")
    limit = LIMITS["integer" if info.passes["integer_products"] else "float"]
    return dataclasses.replace(info, relative_difference=_compare(bundle, folder, info, limit))


def _build_cuda(bundle: Bundle, folder: Path, precision: str, progress: Progress) -> EngineInfo:
    """Compared on the CPU provider, through the engine's own device memory; it has no kernels for bfloat16."""
    info = build_cuda(bundle, folder, precision, progress)
    if info.settings["precision"] != "float16":
        return info
    progress("comparing with the canonical graph, on the CPU")
    on_cpu = Provider(device="cuda", location="cpu")
    return dataclasses.replace(info, relative_difference=_compare(bundle, folder, info, LIMITS["half"], on_cpu))


def builder_versions(*packages: str) -> dict[str, str]:
    """Of those packages, and of ONNX Runtime, which onnxruntime and onnxruntime-gpu both bring."""
    import onnxruntime

    return {name: importlib.metadata.version(name) for name in packages} | {"onnxruntime": onnxruntime.__version__}


def _compare(bundle: Bundle, folder: Path, info: EngineInfo, limit: float, provider: Provider = CPU) -> float:
    """Largest relative difference, decoding one sequence and a batch; raises EngineError above the limit."""
    with np.load(bundle.path / GOLDEN) as golden:
        input_ids, sources = golden["input_ids"][:1], list(golden["sources"][:1]) if "sources" in golden else []
    # Where nothing is rounded to whole numbers, nor may the canonical graph be: ONNX Runtime does that to some on its own.
    reference = CPU if "integer_products" in info.passes else Provider(entries=AS_WRITTEN)
    wanted = _outputs(OnnxRuntimeEngine(bundle, provider=reference), input_ids, sources)
    worst = 0.0
    for batch in (1, 2):
        engine = OnnxRuntimeEngine(bundle, built=(info, folder), provider=provider)
        found = _outputs(engine, np.repeat(input_ids, batch, axis=0), sources * batch)
        for ours, theirs in zip(found, wanted, strict=True):
            worst = max(worst, float((np.abs(ours - theirs).max(-1) / np.ptp(theirs, axis=-1)).max()))
    if not worst <= limit:
        raise EngineError(
            f"The lowered graph differs from the canonical one by {worst:.1e} of the logits' range; at most {limit:.0e} is "
            f"allowed. This is a defect of a lowering pass; decode {bundle.path} without building it, and report this."
        )
    return worst


def _outputs(engine: OnnxRuntimeEngine, input_ids: NDArray[np.int64], sources: list[NDArray[Any]]) -> list[NDArray[np.float32]]:
    """Logits of a prefill, and of a tree behind it, so that history, ancestors and positions are all in play."""
    batch, length = input_ids.shape
    cache = engine.new_cache(batch, 2 * length, engine.encode(sources) if sources else None)
    rows = np.broadcast_to(np.arange(length), (batch, length))
    causal = np.broadcast_to(np.tri(length, dtype=np.bool_), (batch, length, length))
    first = engine.forward(cache, input_ids, rows, causal, rows).logits.copy()
    cache.lengths[:] = length
    parents = np.array([ROOT, ROOT, 0, 0, 1], np.int64)
    tree = DraftTree(input_ids[0, :5], parents, np.zeros(5, np.float32))
    ids = np.broadcast_to(input_ids[0, :6], (batch, 6))
    mask = np.broadcast_to(tree.ancestor_mask(), (batch, 6, 6))
    rows = np.broadcast_to(np.arange(6), (batch, 6))
    second = engine.forward(cache, ids, length + np.broadcast_to(tree.depths(), (batch, 6)), mask, rows).logits.copy()
    return [first[0], second[0]]

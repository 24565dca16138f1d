"""What is wrong in itself: files that were changed, and NaN or infinity in golden outputs, weights or any graph's outputs.

Graphs are looked at in the order in which data goes through them, so that the first that is named is the first bad one.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.exporter.golden import Texts
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import ENGINE_FILE, engine_folder
from headstart.runtime.errors import BundleError
from headstart.runtime.graph import Engine
from headstart.runtime.output import check_files

from .outcome import Fault
from .passes import head_outputs, last_outputs

FLOW = ("frontend", "encoder", "decoder")  # heads follow


def damaged_files(bundle: Bundle, device: str) -> list[Fault]:
    """Every file of the bundle, those that an engine replaces included, and of the engine for `device`, against its sha256."""
    faults = _damaged(bundle.path, bundle.manifest.files, "the manifest")
    folder = engine_folder(bundle, device)
    file = folder / ENGINE_FILE
    if file.is_file():
        try:
            listed = dict(json.loads(file.read_text("utf-8"))["files"])
        except (ValueError, KeyError, TypeError) as error:
            return [*faults, Fault(_relative(bundle, file), f"is no valid engine description ({error})")]
        faults += _damaged(folder, listed, ENGINE_FILE, _relative(bundle, folder))
    return faults


def _damaged(folder: Path, files: Mapping[str, str], listing: str, prefix: str = "") -> list[Fault]:
    """All of them, not the first only."""
    faults = []
    for name, digest in files.items():
        try:
            check_files(folder, {name: digest}, listing, "export or copy the bundle again")
        except BundleError as error:
            faults.append(Fault(f"{prefix}/{name}".lstrip("/"), str(error).removeprefix(str(folder / name)).strip()))
    return faults


def _relative(bundle: Bundle, path: Path) -> str:
    return path.relative_to(bundle.path).as_posix()


def not_finite_golden(golden: Mapping[str, NDArray[Any]]) -> list[Fault]:
    """Arrays of the golden file that hold NaN or infinity; comparing with those could never fail."""
    return [
        Fault("golden.npz", f"{name} holds {_count(array)} NaN or infinite values: every value must be finite")
        for name, array in golden.items()
        if array.dtype.kind == "f" and _count(array)
    ]


def not_finite_weights(bundle: Bundle, device: str) -> list[Fault]:
    """Weights of the canonical graphs and of the engine's. Raises ModuleNotFoundError without onnx-ir."""
    return [
        Fault(f"{graph} ({file})", f"{wrong} of {size} values of {name} are NaN or infinite: every weight must be finite")
        for graph, file, model in _graphs(bundle, device)
        for name, wrong, size in _bad_weights(model)
    ]


def _graphs(bundle: Bundle, device: str) -> Iterator[tuple[str, str, Any]]:
    """(graph, file, onnx_ir Model): the canonical graphs in the order of the data flow, then the engine's ONNX files."""
    import onnx_ir as ir

    from headstart.exporter.heads.storage import load_head

    graphs = bundle.manifest.graphs
    for graph in (*(name for name in FLOW if name in graphs), *(name for name in graphs if name not in FLOW)):
        yield f"canonical {graph}", graphs[graph].file, ir.load(bundle.path / graphs[graph].file)
    for head in bundle.manifest.heads:
        yield f"canonical heads/{head}", bundle.head(head).graph.file, load_head(bundle, head)
    folder = engine_folder(bundle, device)
    if (folder / ENGINE_FILE).is_file():
        built: dict[str, str] = json.loads((folder / ENGINE_FILE).read_text("utf-8"))["graphs"]
        for graph, file in built.items():
            if file.endswith(".onnx"):
                yield f"{device} {graph}", _relative(bundle, folder / file), ir.load(folder / file)


def _bad_weights(model: Any) -> Iterator[tuple[str, int, int]]:
    """(name, NaN or infinite values, all values) of floating-point weights; a single -inf is a mask's constant, no weight."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point() or tensor.size < 2:
            continue
        wrong = _count(tensor.numpy())
        if wrong:
            yield name, wrong, tensor.size


def not_finite_outputs(engines: Mapping[str, Engine], bundle: Bundle, golden: Mapping[str, NDArray[Any]]) -> list[Fault]:
    """The first graph, in the order of the data flow, with NaN or infinity in its outputs on the golden inputs; or none."""
    for device, engine in engines.items():
        for graph, name, array in _outputs(engine, bundle, golden):
            if _count(array):
                return [
                    Fault(
                        f"{device} {graph}", f"{_count(array)} of {array.size} values of its output {name} are NaN or infinite"
                    )
                ]
    return []


def _outputs(engine: Engine, bundle: Bundle, golden: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """(graph, output, values) on the golden inputs."""
    if "frontend" in bundle.manifest.graphs and bundle.manifest.audio is not None:
        second = np.zeros(bundle.manifest.audio.window or bundle.manifest.audio.sampling_rate, np.float32)
        yield "frontend", "features", engine.features(second)
    for ids, source in Texts(golden["input_ids"], golden.get("sources")).pairs():
        if source is not None:
            cross = engine.encode([source])
            yield "encoder", "states", cross.hidden
            yield from (("encoder", name, np.asarray(values)) for name, values in zip(cross.names, cross.buffers, strict=True))
        logits, hidden = last_outputs(engine, ids.tolist(), source)
        yield "decoder", "logits", logits
        yield "decoder", "hidden", hidden
        for head in bundle.manifest.heads:
            outputs = head_outputs(engine, head, hidden, int(logits.argmax()))
            yield from ((f"heads/{head}", name, values) for name, values in outputs.items())


def _count(array: NDArray[Any]) -> int:
    """Of values that are NaN or infinite; types that numpy does not know (bfloat16) are widened."""
    return int(array.size - np.isfinite(array.astype(np.float32, copy=False)).sum())

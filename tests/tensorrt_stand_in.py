"""Stand-ins for a GPU: memory in one numpy array that checks every access, and plans that ONNX Runtime computes.

What the plans compute is the very graph that is lowered for TensorRT, reading and writing at the addresses the engine gives.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.exporter.graph import save_graph
from headstart.exporter.heads.storage import load_head
from headstart.exporter.lowering.tensorrt import lower, lower_frontend
from headstart.exporter.tensorrt.profiles import decoder_profiles, head_profiles
from headstart.exporter.tensorrt.recordings import encoder_profiles, frontend_profiles
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import EngineInfo, PlanInfo, Profile
from headstart.runtime.engines.ort_session import element_type, open_session
from headstart.runtime.engines.trt_engine import TensorRtEngine
from headstart.runtime.graph import MAX_ROWS

TOKENS = 192
SLOTS = TOKENS + MAX_ROWS


class Memory:
    """A device. Whatever is read or written must lie in one allocation that was not freed.

    Attributes:
        traffic: what was asked for, in order: ("up" | "down" | "copy", bytes).
    """

    def __init__(self) -> None:
        self.bytes, self._end = np.zeros(96 << 20, np.uint8), 256
        self.allocated: dict[int, int] = {}
        self.traffic: list[tuple[str, int]] = []

    def allocate(self, nbytes: int) -> int:
        assert nbytes > 0
        address, self._end = self._end, -(-(self._end + nbytes) // 256) * 256
        assert self._end <= len(self.bytes)
        self.allocated[address] = nbytes
        return address

    def free(self, address: int) -> None:
        del self.allocated[address]

    def view(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert any(begin <= address and address + size <= begin + held for begin, held in self.allocated.items())
        return self.bytes[address : address + size].view(dtype).reshape(shape)

    def upload(self, address: int, data: NDArray[Any]) -> None:
        assert data.flags.c_contiguous
        self.traffic.append(("up", data.nbytes))
        self.view(address, data.shape, data.dtype)[...] = data

    def download(self, data: NDArray[Any], address: int) -> None:
        self.traffic.append(("down", data.nbytes))
        data[...] = self.view(address, data.shape, data.dtype)

    def copy(self, target: int, source: int, pitch: int, width: int, height: int) -> None:
        self.traffic.append(("copy", width * height))
        assert 0 < width <= pitch
        for row in range(height):
            piece = self.view(source + row * pitch, (width,), np.uint8)
            assert abs(source - target) >= width, "a copy onto itself is not defined"
            self.view(target + row * pitch, (width,), np.uint8)[...] = piece

    def moved(self, kind: str) -> list[int]:
        """Bytes of each copy of that kind."""
        return [nbytes for what, nbytes in self.traffic if what == kind]


class StandInPlan:
    """A lowered graph in ONNX Runtime, between addresses; every shape must be one of its profile's.

    Attributes:
        profiles: of the passes so far.
        places: where the tensors of each pass lay.
    """

    def __init__(self, file: Path, memory: Memory, profiles: Sequence[Profile]) -> None:
        self.session, self.memory, self._known = open_session(file, 1), memory, profiles
        nodes = (*self.session.get_inputs(), *self.session.get_outputs())
        self.kinds = {node.name: element_type(node.type) for node in nodes}
        self.profiles: list[int] = []
        self.places: list[dict[str, int]] = []

    def run(self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        self.profiles.append(profile)
        self.places.append(dict(addresses))
        feeds = {}
        for node in self.session.get_inputs():
            shape = tuple(shapes[node.name]) if any(isinstance(axis, str) for axis in node.shape) else tuple(node.shape)
            self._check(self._known[profile], node.shape, shape)
            feeds[node.name] = self.memory.view(addresses[node.name], shape, self.kinds[node.name]).copy()
        for node, value in zip(self.session.get_outputs(), self.session.run(None, feeds), strict=True):
            assert addresses[node.name] % 256 == 0 or node.name.endswith(contract.updated(""))
            self.memory.view(addresses[node.name], value.shape, value.dtype)[...] = value

    @staticmethod
    def _check(profile: Profile, axes: Sequence[str | int], shape: tuple[int, ...]) -> None:
        for axis, size in zip(axes, shape, strict=True):
            if isinstance(axis, str):
                least, _, most = profile.sizes[axis]
                assert least <= size <= most, f"{profile.name}: {axis} {size}"
            else:
                assert axis == size


def stand_in(
    bundle: Bundle, folder: Path, source_rows: int = 0, seconds: float | None = None, batch: int = 1
) -> TensorRtEngine:
    """An engine of every graph of the bundle, lowered as for TensorRT, over stand-ins."""
    memory, sizes = Memory(), {"batch": 1, "slots": SLOTS, "source": source_rows}
    profiles: dict[str, tuple[Profile, ...]] = {"decoder": decoder_profiles(32, batch)}
    graphs = {"decoder": ir.load(bundle.path / bundle.manifest.graphs["decoder"].file)}
    for name in bundle.manifest.heads:
        graphs[f"heads/{name}"], profiles[f"heads/{name}"] = load_head(bundle, name), head_profiles(batch)
    opened = {axis: size for axis, size in sizes.items() if axis != "batch" or batch == 1}
    lowered = {name: lower(graph, "float16", opened).model for name, graph in graphs.items()}
    if "encoder" in bundle.manifest.graphs:
        encoder = ir.load(bundle.path / bundle.manifest.graphs["encoder"].file)
        lowered["encoder"], profiles["encoder"] = lower(encoder, "float16", sizes).model, encoder_profiles(bundle, seconds)
    if "frontend" in bundle.manifest.graphs:
        frontend = ir.load(bundle.path / bundle.manifest.graphs["frontend"].file)
        lowered["frontend"], profiles["frontend"] = lower_frontend(frontend, sizes).model, frontend_profiles(bundle, seconds)
    for name, graph in lowered.items():
        save_graph(graph, folder / f"{name}.onnx")
    info = EngineInfo(
        schema_version=1,
        device="trt-rtx:sm89",
        created="",
        builder={"tensorrt_rtx": "1"},
        source={},
        graphs={},
        settings={"precision": "float16"},
        plans={name: PlanInfo(0, 0.0, found, {}) for name, found in profiles.items()},
        cache_slots=SLOTS,
        batch=batch,
        source_rows=source_rows,
    )
    return TensorRtEngine(bundle, info, memory, lambda name: StandInPlan(folder / f"{name}.onnx", memory, profiles[name]))

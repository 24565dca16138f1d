"""The engine on TensorRT, classic or for RTX: plans with fixed sizes, over the device layer (`device`).

A pass runs through the smallest profile that holds its rows. The host's side is tested with stand-ins for the device and the
plans that run the same lowered graphs in ONNX Runtime; `trt_cuda.Cuda` and `trt_plans.LoadedPlan` HAVE NOT BEEN RUN ON A GPU
YET.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import EngineError
from headstart.runtime.graph import MAX_ROWS, HostOutputs
from headstart.runtime.states import SLOT_STEP, CrossState

from .device import DeviceGraph
from .info import EngineInfo, built_engine, engine_folder
from .last_source import LastSource
from .sources import check_length, filled, read_source
from .trt_memory import CopyMoves, Device, TrtMemory
from .trt_plans import Plan, PlanExecutor

ONCE = ("encoder", "frontend")  # graphs that run once a source


class TensorRtEngine:
    """The bundle's graphs as built for one device."""

    def __init__(self, bundle: Bundle, info: EngineInfo, device: Device, open_plan: Callable[[str], Plan]) -> None:
        """`open_plan`: name of a graph of the engine -> its plan."""
        self.bundle, self.info = bundle, info
        self.built: tuple[EngineInfo, Path] | None = (info, engine_folder(bundle, info.device))
        self.device, self.threads = info.device, 0
        self.model = dataclasses.replace(bundle.manifest.model, max_cache=info.cache_slots - MAX_ROWS)
        self._memory, self._mover, self._open_plan = TrtMemory(device), CopyMoves(device), open_plan
        self._graphs: dict[str, DeviceGraph] = {}
        self._last_source: LastSource[CrossState] = LastSource()
        self.graph("decoder")

    @classmethod
    def open(cls, bundle: Bundle, device: str) -> "TensorRtEngine":
        """Raises EngineError when nothing was built for `device`, when it is stale, or when there is no GPU."""
        from .trt_cuda import Cuda
        from .trt_plans import PlanLoader

        if bundle.manifest.model.source and "encoder" not in bundle.manifest.graphs:
            raise EngineError(f"{bundle.path} is an assistant without an encoder of its own. Fix: --device cpu.")
        info = built_engine(bundle, device)
        if info is None:
            raise EngineError(f"{bundle.path} is not built for {device}. Fix: headstart build {bundle.path} --device {device}.")
        bundle.check_hashes(unread=info.replaced())
        loader = PlanLoader(info, engine_folder(bundle, device), Cuda)
        return cls(bundle, info, loader.cuda, loader.open)

    @property
    def exact(self) -> bool:
        """Half precision rounds differently for every number of rows."""
        return False

    def graph(self, name: str) -> DeviceGraph:
        if name not in self._graphs:
            info = self.bundle.graphs.get(name)
            if info is None:
                raise EngineError(f"{self.bundle.path} has no graph {name!r}. It has: {', '.join(self.bundle.graphs)}.")
            if name not in self.info.plans:
                raise EngineError(f"The engine for {self.device} has no {name}. Fix: headstart build --force, again.")
            executor = PlanExecutor(self._open_plan(name), info, self.info.plans[name].profiles)
            graph = DeviceGraph(name, info, executor, self._memory, self._mover, self._room, name in ONCE)
            self._graphs[name] = graph
            if info.states:
                self._reserve(graph, executor)
        return self._graphs[name]

    def _reserve(self, graph: DeviceGraph, executor: PlanExecutor) -> None:
        """Outputs for the most rows a pass can have, and inputs for the longest prompt."""
        sizes = [{"batch": 1} | {axis: most for axis, (_, _, most) in p.sizes.items()} for p in executor.profiles]
        largest = {axis: max(size.get(axis, 1) for size in sizes) for axis in ("rows", "chosen")}
        batch = max(size["batch"] for size in sizes)
        # Rows of prompts are of one sequence, and a batch has a verify pass's: what both need, spread over the batch.
        rows, chosen = (max(size["batch"] * size.get(axis, 1) for size in sizes) for axis in largest)
        graph.reserve(
            {"batch": batch, "rows": -(-rows // batch), "chosen": -(-chosen // batch), "slots": self.info.cache_slots}
        )
        graph.reserve_prompts({"batch": 1, "rows": largest["rows"], "chosen": 1, "slots": self.info.cache_slots})

    def _room(self, batch: int, slots: int) -> int:
        """Raises EngineError for more sequences, or more slots, than the engine was built with."""
        fix = f"Fix: headstart build {self.bundle.path} --device {self.device}"
        if batch > self.info.batch:
            raise EngineError(
                f"The engine for {self.device} decodes {self.info.batch} sequences together, and {batch} are wanted. "
                f"{fix} --batch {batch} --force, or fewer prompts (or beams) a call."
            )
        if slots >= self.info.cache_slots + SLOT_STEP:  # callers round up
            raise EngineError(
                f"The engine for {self.device} holds {self.model.max_cache} tokens, and {slots} are wanted. "
                f"{fix} --cache {slots} --force, or a shorter text."
            )
        return self.info.cache_slots

    def features(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """[samples] of a recording to the encoder's input: the samples themselves where there is no front-end.

        Raises PromptError for a length that the engine was not built for, EngineError for one built without a front-end.
        """
        if "frontend" not in self.bundle.manifest.graphs:
            return samples
        if (plan := self.info.plans.get("frontend")) is None:
            raise EngineError(f"The engine for {self.device} has no front-end. Fix: headstart build --force, again.")
        if plan.profiles:
            check_length(plan, "samples", len(samples), "samples")
        features: NDArray[np.float32] = self.graph("frontend").run({contract.AUDIO: samples[None]})[contract.INPUT_FEATURES][0]
        return features

    def encode(self, sources: Sequence[NDArray[Any]]) -> CrossState:
        """Run the encoder over one source after another; states are padded to the size built for, and stay in half precision.

        Raises PromptError for a source it has no room for.
        """
        found = [self._last_source.encoded(source, self._encode) for source in sources]
        buffers = zip(*(state.buffers for state in found), strict=True)
        mask, hidden = (np.concatenate([getattr(state, name) for state in found]) for name in ("mask", "hidden"))
        return CrossState(found[0].names, tuple(map(np.concatenate, buffers)), mask, hidden)

    def _encode(self, one: NDArray[Any]) -> CrossState:
        info, most = self.bundle.manifest.graphs["encoder"], self.info.source_rows
        source = read_source(info, self.info.plans.get("encoder"), one, most)
        masked = contract.ENCODER_MASK in {tensor.name for tensor in info.inputs}
        inputs = source.inputs | ({contract.ENCODER_MASK: source.mask} if masked else {})
        outputs = self.graph("encoder").run(inputs)
        assert isinstance(outputs, HostOutputs)
        arrays = {name: filled(array, -2, most) for name, array in outputs.arrays.items()}
        hidden = arrays.pop(contract.ENCODER_HIDDEN).astype(np.float32)
        return CrossState(tuple(arrays), tuple(arrays.values()), source.mask, hidden)

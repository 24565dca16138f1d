"""TensorRT's plans on a GPU, of the classic library or of the one for RTX: loaded, given addresses, started, replayed.

Each profile has a context of its own, so that nothing changes profiles and a captured pass stays good; they take turns in one
piece of scratch memory. What differs between the libraries, besides the module's name:

|                    | TensorRT for RTX                          | classic TensorRT              |
| ------------------ | ----------------------------------------- | ----------------------------- |
| CUDA graphs        | its own, switched on in a runtime config  | captured here, from the stream |
| kernels            | finished on the device, and kept in a file | finished when it was built    |

NOT YET RUN ON A GPU. The calls are tested against stand-ins for the modules, and their names against the real ones.
"""

import dataclasses
import importlib
import os
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from headstart.runtime import contract
from headstart.runtime.bundle import GraphInfo, TensorInfo
from headstart.runtime.errors import EngineError, missing_extra

from .buckets import Pass, passes
from .device import Tensor
from .info import EngineInfo, Profile
from .step import lowered_info
from .trt_memory import Device

LIBRARIES = ("tensorrt_rtx", "tensorrt")
RUNTIME_CACHE = "runtime.cache"  # in the plans' folder; not hashed, because it changes
Key = tuple[Any, ...]
# The library's names of types to numpy's.
TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}


class GraphDevice(Device, Protocol):
    """A device that can record what is started on its stream, and start it again as one."""

    stream: int

    def capture(self, start: Callable[[], bool]) -> int | None:
        """Record what `start` starts; a graph, or None where it cannot be recorded."""
        ...

    def launch(self, graph: int) -> None: ...


class Plan(Protocol):
    """A built graph.

    Attributes:
        kinds: tensor -> type, of all inputs and outputs.
    """

    kinds: Mapping[str, str]

    def run(self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        """Start one pass. `shapes` are the inputs'; `addresses` those of inputs and outputs."""
        ...


class PlanExecutor:
    """A plan as the device layer runs it."""

    def __init__(self, plan: Plan, info: GraphInfo, profiles: Sequence[Profile]) -> None:
        self.plan, self.profiles = plan, tuple(profiles)
        self.info = plan_info(info, plan.kinds)

    def passes(self, rows: int, chosen: int, batch: int) -> list[Pass]:
        return passes(self.profiles, rows, chosen, batch)

    def run(self, profile: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], replay: bool) -> None:
        """Plans know themselves which profiles' passes are replayed."""
        shapes = {name: tensor.shape for name, tensor in inputs.items()}
        self.plan.run(profile, shapes, {name: tensor.address for name, tensor in (*inputs.items(), *outputs.items())})


def plan_info(info: GraphInfo, kinds: Mapping[str, str]) -> GraphInfo:
    """The manifest's description of a graph with what lowering for TensorRT replaces and adds."""
    inputs = (*info.inputs, TensorInfo(contract.ROW_MASK, "", (contract.BATCH, contract.ROWS, contract.ROWS)))
    outputs = (*info.outputs, TensorInfo(contract.BEST_IDS, "", (contract.BATCH, contract.CHOSEN)))

    def lowered(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
        return [dataclasses.replace(tensor, dtype=kinds[tensor.name]) for tensor in tensors if tensor.name in kinds]

    return lowered_info(info, lowered(inputs), lowered(outputs))


class PlanLoader:
    """Opens an engine's plans, which share one device and one file of finished kernels."""

    def __init__(self, info: EngineInfo, folder: Path, cuda: Callable[[], Any]) -> None:
        """Raises MissingExtraError or EngineError without the library, in another version, or without a GPU."""
        self._info, self._folder = info, folder
        self._library = open_library(info)
        self.cuda = cuda()
        self._kernels = RuntimeCache(folder / RUNTIME_CACHE) if hasattr(self._library, "IRuntimeCache") else None

    def open(self, name: str) -> "LoadedPlan":
        """Encoder and front-end run once a text, and prompts differ in length: no CUDA graphs are made of those."""
        profiles = self._info.plans[name].profiles
        once = name in ("encoder", "frontend")
        replayed = {i for i, profile in enumerate(profiles) if not once and profile.sizes.get("chosen") != (1, 1, 1)}
        file = self._folder / self._info.graphs[name]
        weights = file.with_suffix(".onnx") if "strip_weights" in self._info.settings else None
        return LoadedPlan(self._library, file, self.cuda, replayed, self._kernels, weights)


def open_library(info: EngineInfo) -> Any:
    """The module an engine was built with. Raises MissingExtraError without it, EngineError for another version."""
    name = next(name for name in LIBRARIES if name in info.builder)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name == "tensorrt":
            raise EngineError("The Python package tensorrt is missing. JetPack brings it: docs/jetson.md.") from error
        raise missing_extra(error, f"Decoding with {info.device}") from error
    if module.__version__ != info.builder[name]:
        raise EngineError(
            f"The engine was built with {name} {info.builder[name]}, and here is {module.__version__}: plans do not move "
            f"between versions. Fix: headstart build BUNDLE --device {info.device} --force."
        )
    return module


class RuntimeCache:
    """Kernels that TensorRT for RTX finished on this machine, in one file for all plans of an engine.

    Read when the first plan is opened, written when the engine is closed or Python ends. The library itself refuses what
    another version, driver or GPU wrote; the file is then rewritten.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._cache: Any = None

    def attach(self, config: Any) -> None:
        """Let a context to be created from `config` (IRuntimeConfig) use and extend the kernels."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._file.is_file():
                self._cache.deserialize(self._file.read_bytes())  # False leaves it empty
            weakref.finalize(self, save_cache, self._cache, self._file)
        config.set_runtime_cache(self._cache)


def save_cache(cache: Any, file: Path) -> None:
    """Write it whole or not at all. A bundle that cannot be written to is no reason to stop: warns."""
    with memoryview(cache.serialize()) as content:
        if file.is_file() and file.read_bytes() == content:
            return
        written = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            written.write_bytes(content)
            written.replace(file)
        except OSError as error:
            warnings.warn(f"{file} cannot be written ({error}): the next start finishes its kernels again.", stacklevel=2)


class LoadedPlan:
    """A plan on the GPU."""

    def __init__(
        self,
        library: Any,
        file: Path,
        cuda: GraphDevice,
        replayed: Collection[int] = (),
        kernels: RuntimeCache | None = None,
        weights: Path | None = None,
    ) -> None:
        """`replayed`: profiles whose passes come again and again; `weights`: the graph a stripped plan gets its weights from.

        Raises EngineError for a plan of another GPU, or weights that do not fit.
        """
        self._library, self._cuda, self._replayed, self._kernels = library, cuda, frozenset(replayed), kernels
        self._log = library.Logger(library.Logger.ERROR)
        self._runtime = library.Runtime(self._log)
        self.engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self.engine is None:
            raise EngineError(f"{file} cannot be loaded: it was built for another GPU. Fix: headstart build --force, here.")
        if weights is not None:
            self._put_in(weights)
        self.names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self.kinds: Mapping[str, str] = {name: TYPES[self.engine.get_tensor_dtype(name).name] for name in self.names}
        size = self.engine.device_memory_size_v2
        self._scratch = cuda.allocate(size) if size else 0, size
        self._contexts: dict[int, Any] = {}
        self._bound: dict[int, Key] = {}
        self._graphs: dict[Key, int] = {}
        self._captures = not hasattr(library, "CudaGraphStrategy")

    def _put_in(self, weights: Path) -> None:
        refitter = self._library.Refitter(self.engine, self._log)
        parser = self._library.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_file(str(weights)) or not refitter.refit_cuda_engine():
            raise EngineError(f"{weights} does not hold the plan's weights. Fix: headstart build --force.")

    def run(self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        """Raises EngineError when TensorRT refuses."""
        key: Key = (profile, *(shapes.get(name) for name in self.names), *(addresses[name] for name in self.names))
        if key in self._graphs:
            self._cuda.launch(self._graphs[key])
            return
        context, known = self._context(profile), self._bound.get(profile) == key
        if not known:
            self._bind(context, shapes, addresses)
            self._bound[profile] = key
        if not (known and self._captures and profile in self._replayed and self._captured(context, key)):
            self._start(context)

    def _start(self, context: Any) -> None:
        if not context.execute_async_v3(self._cuda.stream):
            raise EngineError("TensorRT could not run a pass; its log says why.")

    def _captured(self, context: Any, key: Key) -> bool:
        """Record a pass that ran before, and start the record. The first run does what cannot be recorded: it takes memory."""
        graph = self._cuda.capture(lambda: bool(context.execute_async_v3(self._cuda.stream)))
        if graph is None:
            warnings.warn("A pass could not be captured as a CUDA graph; decoding goes on without.", stacklevel=2)
            self._captures = False
            return False
        self._graphs[key] = graph
        self._cuda.launch(graph)
        return True

    def _bind(self, context: Any, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        for name in self.names:
            if name in shapes and not context.set_input_shape(name, shapes[name]):
                raise EngineError(f"The plan does not take {name} of the shape {list(shapes[name])}. Fix: build it again.")
            if not context.set_tensor_address(name, addresses[name]):
                raise EngineError(f"TensorRT refuses the address of {name}; its log says why.")

    def _context(self, profile: int) -> Any:
        """Made when its profile is first used."""
        if profile not in self._contexts:
            context = self._new_context(profile)
            context.set_optimization_profile_async(profile, self._cuda.stream)
            address, size = self._scratch
            if size:
                context.set_device_memory(address, size)
            self._contexts[profile] = context
        return self._contexts[profile]

    def _new_context(self, profile: int) -> Any:
        library, mine = self._library, self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(library, "CudaGraphStrategy"):
            return self.engine.create_execution_context(mine)
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(mine)
        if profile in self._replayed:
            config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._kernels is not None:
            self._kernels.attach(config)
        return self.engine.create_execution_context(config)

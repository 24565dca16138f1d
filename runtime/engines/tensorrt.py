"""The engine on TensorRT, classic or for RTX: plans with fixed sizes, buffers on the device, caches updated where they lie.

A forward goes up in one copy (`buckets.Packed`), runs through the smallest profile that holds its rows, and its logits and
hidden states come down. A commit moves slots on the device. The host's side is tested with stand-ins for `Device` and `Plan`
that run the same lowered graphs in ONNX Runtime; `cuda.Cuda` and `LoadedPlan` HAVE NOT BEEN RUN ON A GPU YET.
"""

import dataclasses
import importlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, CacheInfo, HeadInfo, TensorInfo
from headstart.runtime.cache import CrossState, KVCache
from headstart.runtime.engine import MAX_ROWS, HostOutput, StepOutput
from headstart.runtime.engines.buckets import Packed, Pass, moves, passes
from headstart.runtime.engines.half import STORED, narrowed, widened
from headstart.runtime.engines.info import EngineInfo, built_engine, engine_folder
from headstart.runtime.errors import EngineError, PromptError, missing_extra

TENSORRT_DEVICES = ("trt-rtx", "tensorrt")  # of which the former names GPU generations behind a colon
LIBRARIES = ("tensorrt_rtx", "tensorrt")


class Device(Protocol):
    """Memory on the device and copies in order; see `cuda.Cuda`. Addresses are whole numbers."""

    def allocate(self, nbytes: int) -> int: ...

    def free(self, address: int) -> None: ...

    def upload(self, address: int, data: NDArray[Any]) -> None: ...

    def download(self, data: NDArray[Any], address: int) -> None: ...

    def move_slot(self, address: int, plane: int, width: int, planes: int, source: int, target: int) -> None: ...


class Plan(Protocol):
    """A built graph."""

    def run(self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        """Start one pass. `shapes` are the inputs'; `addresses` where inputs and outputs lie."""
        ...


class DeviceCache(KVCache):
    """The caches of one sequence, on the device; with an encoder, what the decoder reads of the source beside them."""

    def __init__(self, infos: Sequence[CacheInfo], slots: int, device: Device, cross: CrossState | None = None) -> None:
        self.names = [name for info in infos for name in (info.key_name, info.value_name)]
        self.lengths = np.zeros(1, np.int64)
        self.buffers = []
        self.engine_state = {}
        self._slots, self._device = slots, device
        sizes = [size for info in infos for size in (info.key_size, info.value_size)]
        heads = [info.kv_heads for info in infos for _ in range(2)]
        self._planes = list(zip(heads, sizes, strict=True))
        self.addresses = [device.allocate(2 * head * slots * size) for head, size in self._planes]
        self.cross = cross
        arrays = dict(zip(cross.names, cross.buffers, strict=True)) | {contract.ENCODER_MASK: cross.mask} if cross else {}
        self.source_addresses = {name: device.allocate(array.nbytes) for name, array in arrays.items()}
        for name, array in arrays.items():
            device.upload(self.source_addresses[name], array)
        weakref.finalize(self, _free, device, [*self.addresses, *self.source_addresses.values()])

    @property
    def slots(self) -> int:
        return self._slots

    def row(self, index: int) -> "DeviceCache":
        assert index == 0
        return self

    def commit(self, row: int, kept: Sequence[int]) -> None:
        for source, target in moves(int(self.lengths[row]), kept):
            for address, (heads, size) in zip(self.addresses, self._planes, strict=True):
                self._device.move_slot(address, 2 * size * self._slots, 2 * size, heads, source, target)
        self.lengths[row] += len(kept)


def _free(device: Device, addresses: Sequence[int]) -> None:
    for address in addresses:
        device.free(address)


class TensorRtEngine:
    """The bundle's decoder as built for one device."""

    def __init__(self, bundle: Bundle, info: EngineInfo, device: Device, open_plan: Callable[[str], Plan]) -> None:
        """`open_plan`: name of a graph of the engine -> its plan."""
        self.bundle, self.info, self.built = bundle, info, (info, engine_folder(bundle, info.device))
        self.device, self.threads = info.device, 0
        self.model = dataclasses.replace(bundle.manifest.model, max_cache=info.cache_slots - MAX_ROWS)
        self._memory, self._open_plan = device, open_plan
        self._precision = info.settings["precision"]
        self._profiles = info.plans["decoder"].profiles
        self._plan = open_plan("decoder")
        self._encoder: Plan | None = None
        self._packed: dict[tuple[int, int], tuple[Packed, int]] = {}
        self._outputs = self._allocate_outputs()

    @classmethod
    def open(cls, bundle: Bundle, device: str) -> "TensorRtEngine":
        """Raises EngineError when nothing was built for `device`, when it is stale, or when there is no GPU."""
        from .cuda import Cuda

        if bundle.manifest.model.source and "encoder" not in bundle.manifest.graphs:
            raise EngineError(f"{bundle.path} is an assistant without an encoder of its own. Fix: --device cpu.")
        info = built_engine(bundle, device)
        if info is None:
            raise EngineError(f"{bundle.path} is not built for {device}. Fix: headstart build {bundle.path} --device {device}.")
        bundle.check_hashes(unread=info.replaced())
        library = open_library(info)
        cuda = Cuda()
        folder = engine_folder(bundle, device)
        return cls(bundle, info, cuda, lambda name: LoadedPlan(library, folder / info.graphs[name], cuda.stream))

    @property
    def exact(self) -> bool:
        """Half precision rounds differently for every number of rows."""
        return False

    def _allocate_outputs(self) -> dict[str, tuple[int, int]]:
        """Output -> (address, values per row), for the most rows a pass can have."""
        model = self.bundle.manifest.model
        rows = max(profile.sizes["rows"][2] for profile in self._profiles)
        chosen = max(profile.sizes["chosen"][2] for profile in self._profiles)
        widths = {contract.LOGITS: (chosen, model.vocab_size), contract.HIDDEN: (rows, model.hidden_size)}
        if model.aux_layers:
            widths[contract.AUX_HIDDEN] = (rows, model.hidden_size * len(model.aux_layers))
        return {name: (self._memory.allocate(2 * count * width), width) for name, (count, width) in widths.items()}

    def features(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raises EngineError: the front-end of recordings is not built for TensorRT yet."""
        if "frontend" in self.bundle.manifest.graphs:
            raise EngineError("Recordings are not read with TensorRT yet. Fix: give features, or decode with --device cpu.")
        return samples

    def encode(self, sources: Sequence[NDArray[Any]]) -> CrossState:
        """Run the encoder over one source, padded to the size it was built for. Cross states stay in half precision.

        Raises PromptError for a source it has no room for, EngineError for several.
        """
        if len(sources) != 1:
            raise EngineError("The TensorRT engine decodes one sequence at a time. Fix: one source a call.")
        graph, rows = self.bundle.manifest.graphs["encoder"], self.info.source_rows
        inputs, mask = _padded_source(graph.inputs[0], sources[0], rows, self._precision)
        hidden_size = int(graph.outputs[0].shape[2])
        shapes: dict[str, tuple[int, ...]] = {contract.ENCODER_HIDDEN: (1, rows, hidden_size)}
        for info in self.bundle.manifest.cross_caches:
            shapes[info.key_name] = (1, info.kv_heads, rows, info.key_size)
            shapes[info.value_name] = (1, info.kv_heads, rows, info.value_size)
        if contract.ENCODER_MASK in {tensor.name for tensor in graph.inputs}:
            inputs[contract.ENCODER_MASK] = mask
        found = self._run_encoder(inputs, shapes)
        hidden = widened(found.pop(contract.ENCODER_HIDDEN), self._precision)
        return CrossState(tuple(found), tuple(found.values()), mask, hidden)

    def _run_encoder(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, tuple[int, ...]]
    ) -> dict[str, NDArray[Any]]:
        """The encoder's outputs, as stored. Its buffers live for this one pass."""
        if self._encoder is None:
            self._encoder = self._open_plan("encoder")
        found = {name: np.zeros(shape, STORED[self._precision]) for name, shape in outputs.items()}
        addresses = {name: self._memory.allocate(array.nbytes) for name, array in {**inputs, **found}.items()}
        for name, array in inputs.items():
            self._memory.upload(addresses[name], array)
        self._encoder.run(0, {name: array.shape for name, array in inputs.items()}, addresses)
        for name, array in found.items():
            self._memory.download(array, addresses[name])
        _free(self._memory, list(addresses.values()))
        return found

    def new_cache(self, batch: int, slots: int, cross: CrossState | None = None) -> KVCache:
        """Raises EngineError for more sequences than one, or more slots than the engine was built with."""
        if batch != 1 or self.info.batch != 1:
            raise EngineError("The TensorRT engine decodes one sequence at a time. Fix: one prompt a call, and --batch 1.")
        if slots > self.info.cache_slots:
            raise EngineError(
                f"The engine for {self.device} holds {self.model.max_cache} tokens, and {slots} are wanted. "
                f"Fix: headstart build {self.bundle.path} --device {self.device} --cache {slots} --force, or a shorter text."
            )
        return DeviceCache(self.bundle.manifest.caches, self.info.cache_slots, self._memory, cross)

    def forward(
        self,
        cache: KVCache,
        token_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        row_mask: NDArray[np.bool_],
        output_rows: NDArray[np.int64],
    ) -> StepOutput:
        assert isinstance(cache, DeviceCache)
        found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in self._outputs}
        prompt = False
        for part in passes(self._profiles, token_ids.shape[1], output_rows.shape[1]):
            packed, address = self._packed_for(part)
            packed.fill(int(cache.lengths[0]), part, token_ids, position_ids, row_mask, output_rows)
            self._memory.upload(address, packed.data)
            self._plan.run(part.profile, packed.shapes, self._addresses(packed, address, cache))
            prompt = part.prompt
            for name, pieces in found.items():
                if name != contract.LOGITS or not prompt or part.begin <= output_rows[0, 0] < part.end:
                    pieces.append(self._downloaded(name, part))
        whole = {name: np.concatenate(pieces)[None] for name, pieces in found.items()}
        logits = whole[contract.LOGITS] if prompt else whole[contract.LOGITS][:, output_rows[0]]
        return HostOutput(logits, whole[contract.HIDDEN], whole.get(contract.AUX_HIDDEN))

    def _addresses(self, packed: Packed, address: int, cache: DeviceCache) -> dict[str, int]:
        """Where every tensor of a pass lies; a cache comes in and goes out at one place."""
        places = {name: address + offset for name, offset in packed.offsets.items()}
        places |= {name: where for name, (where, _) in self._outputs.items()}
        for name, where in zip(cache.names, cache.addresses, strict=True):
            places[name] = places[contract.updated(name)] = where
        return places | cache.source_addresses

    def _packed_for(self, part: Pass) -> tuple[Packed, int]:
        """The inputs' buffer of that shape, on the host and on the device; made once."""
        key = (part.padded, part.chosen)
        if key not in self._packed:
            packed = Packed(part.padded, part.chosen, self.info.cache_slots)
            self._packed[key] = packed, self._memory.allocate(packed.data.nbytes)
        return self._packed[key]

    def _downloaded(self, name: str, part: Pass) -> NDArray[np.float32]:
        """[rows, width] float32 of one output."""
        address, width = self._outputs[name]
        count = 1 if part.prompt and name == contract.LOGITS else part.end - part.begin
        stored = np.zeros((count, width), STORED[self._precision])
        self._memory.download(stored, address)
        return widened(stored, self._precision)

    def head(self, info: HeadInfo) -> "TensorRtHead":
        return TensorRtHead(info, self._open_plan(f"heads/{info.name}"), self._memory, self._precision)


def _padded_source(
    info: TensorInfo, source: NDArray[Any], rows: int, precision: str
) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
    """({input: array}, [1, E] mask) of one source; text is padded to `rows`, features have the one shape the graph takes."""
    if info.dtype == "int64":
        if len(source) > rows:
            raise PromptError(
                f"The source has {len(source)} tokens, and the engine takes {rows}. Fix: headstart build --source N."
            )
        return {info.name: np.pad(source, (0, rows - len(source)))[None].astype(np.int64)}, (np.arange(rows) < len(source))[
            None
        ]
    if tuple(source.shape) != info.shape[1:]:
        raise PromptError(f"The source has the shape {list(source.shape)}; the engine takes {list(info.shape[1:])}.")
    return {info.name: narrowed(source[None], precision)}, np.ones((1, rows), np.bool_)


class TensorRtHead:
    """One draft head."""

    def __init__(self, info: HeadInfo, plan: Plan, device: Device, precision: str) -> None:
        self._info, self._plan, self._memory, self._precision = info, plan, device, precision
        self._shape = (1, info.heads, info.top_k)
        count = info.heads * info.top_k
        sizes = {"hidden": 2 * info.hidden_size, "topk_ids": 8 * count, "topk_log_probs": 4 * count}
        self._addresses = {name: device.allocate(size) for name, size in sizes.items()}

    def propose(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """[1, 1, H] to ([1, K, k] ids, log-probabilities)."""
        self._memory.upload(self._addresses["hidden"], narrowed(hidden, self._precision))
        self._plan.run(0, {"hidden": (1, 1, self._info.hidden_size)}, self._addresses)
        ids, log_probs = np.zeros(self._shape, np.int64), np.zeros(self._shape, np.float32)
        self._memory.download(ids, self._addresses["topk_ids"])
        self._memory.download(log_probs, self._addresses["topk_log_probs"])
        return ids, log_probs


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


class LoadedPlan:
    """A plan on the GPU: one context that changes profiles. NOT YET RUN."""

    def __init__(self, library: Any, file: Path, stream: int) -> None:
        self._stream, self._profile = stream, 0
        self._runtime = library.Runtime(library.Logger(library.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise EngineError(f"{file} cannot be loaded: it was built for another GPU. Fix: headstart build --force, here.")
        self._context = self._engine.create_execution_context()

    def run(self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        if profile != self._profile:
            self._context.set_optimization_profile_async(profile, self._stream)
            self._profile = profile
        wanted = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        for name in wanted:
            if name in shapes:
                self._context.set_input_shape(name, shapes[name])
            self._context.set_tensor_address(name, addresses[name])
        if not self._context.execute_async_v3(self._stream):
            raise EngineError("TensorRT could not run a pass; its log says why.")

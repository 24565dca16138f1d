"""The engine on ONNX Runtime, on the CPU or on a GPU: one session per graph."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, GraphInfo, HeadInfo, WeightInfo
from headstart.runtime.errors import EngineError, PromptError
from headstart.runtime.graph import HostOutputs, Outputs
from headstart.runtime.states import CrossState

from .device import DeviceGraph
from .info import LM_HEAD, EngineInfo, built_engine, engine_folder
from .last_source import LastSource
from .ort_device import GraphMoves, OrtMemory, SessionExecutor, slots_given
from .ort_host import HostGraph
from .ort_session import AWAKE_BEFORE_LM_HEAD_US, AWAKE_US, CPU, MIN_ROWS, Opened, Provider, cuda_provider, open_session, opened
from .ort_split import HostLmHead, HostSplitDecoder
from .step import source_names

# Threads of anything that drafts. A second pool of spinning threads would fight the target's for the same cores, which
# cost a verify pass 2.5 times its time on two cores; one thread needs no pool.
DRAFT_THREADS = 1


class OnnxRuntimeEngine:
    """The bundle's graphs: as built for the CPU or a GPU; or, on the CPU, the canonical ones as they are."""

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        built: tuple[EngineInfo, Path] | None = None,
        provider: Provider = CPU,
    ) -> None:
        """`built`: an engine and its folder; None is the canonical graph."""
        self.bundle = bundle
        self.model = bundle.manifest.model
        self.device = provider.device
        self.threads = threads or _usable_cpus()
        self.built: tuple[EngineInfo, Path] | None = built
        self._provider = provider
        self._shared: dict[str, Any] = {}
        self._opened: dict[str, Opened] = {}
        self._graphs: dict[str, HostGraph | HostSplitDecoder | DeviceGraph] = {}
        self._memory = OrtMemory(provider.location)
        self._last_source: LastSource[Outputs] = LastSource()
        if built is not None:
            _check_probe(*built)
        self._open_decoder()

    def _open_decoder(self) -> None:
        """At once: what cannot run is known when the engine is opened."""
        decoder = self.graph("decoder")
        if not isinstance(decoder, DeviceGraph):
            self._form("decoder", 1)

    @classmethod
    def open(cls, bundle: Bundle, threads: int | None = None, device: str = "cpu") -> "OnnxRuntimeEngine":
        """With what `headstart build` wrote for the device, if anything for the CPU. Hashes the files that will be read, and no
        others.

        Raises EngineError when the built engine is stale, when nothing was built for a GPU, or when there is none; BundleError
        when a file was edited.
        """
        built_for = "cpu" if device == "cpu" else "cuda"  # whichever provider of a GPU's asks first
        info, folder = built_engine(bundle, built_for), engine_folder(bundle, built_for)
        if info is None and device != "cpu":
            raise EngineError(f"{bundle.path} is not built for cuda. Fix: headstart build {bundle.path} --device cuda.")
        bundle.check_hashes(unread=info.replaced() if info else ())
        provider = CPU if device == "cpu" else cuda_provider(device, engine_folder(bundle, device))
        return cls(bundle, threads, None if info is None else (info, folder), provider)

    @property
    def exact(self) -> bool:
        """Only the order of summation differs from the checkpoint: neither integers nor half precision on the way."""
        return self.built is None or not (self.built[0].passes.get("integer_products") or "precision" in self.built[0].settings)

    @property
    def _has_fixed_scales(self) -> bool:
        """A canonical graph whose activations are rounded by fixed scales."""
        return self.built is None and self.bundle.manifest.quantization.get("activations") == "static"

    def graph(self, name: str) -> HostGraph | HostSplitDecoder | DeviceGraph:
        if name not in self._graphs:
            info = self.bundle.graphs.get(name)
            if info is None:
                known = ", ".join(self.bundle.graphs)
                raise EngineError(f"{self.bundle.path} has no graph {name!r}. It has: {known}.")
            # A front-end is a few operations in float32, on the CPU whatever decodes.
            on_host = not self._provider.location or name == "frontend"
            self._graphs[name] = self._host_graph(name, info) if on_host else self._device_graph(name, info)
        return self._graphs[name]

    def _host_graph(self, name: str, info: GraphInfo) -> HostGraph | HostSplitDecoder:
        graph = HostGraph(name, info, lambda batch: self._form(name, batch))
        return HostSplitDecoder(graph, self._lm_head) if name == "decoder" and self._is_split else graph

    @property
    def _is_split(self) -> bool:
        """The decoder ends with its hidden states, and its LM head is a graph of its own."""
        return self.built is not None and LM_HEAD in self.built[0].graphs

    def _lm_head(self) -> HostLmHead:
        assert self.built is not None
        info, folder = self.built
        return HostLmHead(open_session(folder / info.graphs[LM_HEAD], self.threads), self.model.vocab_size)

    def _form(self, name: str, batch: int) -> Opened:
        """The session for that many sequences; where batches have a form of their own, it is opened when the first comes."""
        file = f"{name}_batch" if batch > 1 and self.built is not None and f"{name}_batch" in self.built[0].graphs else name
        if file not in self._opened:
            least = MIN_ROWS if file == name else 1  # the form for batches pads rows where it needs them
            provider = CPU if self._provider.location else self._provider  # a front-end is on the host whatever decodes
            self._opened[file] = opened(self._session(name, file, provider), self.bundle.graphs[name], least)
        return self._opened[file]

    def _session(self, name: str, file: str, provider: Provider) -> Any:
        """Of a canonical graph, or of the engine's `file` made from it. Weights of the target's are read once for all heads."""
        threads = DRAFT_THREADS if name.startswith("heads/") else self.threads
        awake = 0 if name != "decoder" else AWAKE_BEFORE_LM_HEAD_US if self._is_split else AWAKE_US
        if self.built is not None and file in self.built[0].graphs:
            info, folder = self.built
            return open_session(folder / info.graphs[file], threads, provider=provider, awake_us=awake)
        path = self.bundle.path / self.bundle.graphs[name].file
        if not name.startswith("heads/"):
            return open_session(path, threads, None, provider, self._has_fixed_scales, awake)
        head: HeadInfo = self.bundle.head(name.removeprefix("heads/"))
        return open_session(path, threads, {key: self._shared_weight(weight) for key, weight in head.shared.items()}, provider)

    def _device_graph(self, name: str, info: GraphInfo) -> DeviceGraph:
        """Only graphs with a state have passes of few enough shapes to be captured."""
        once = name == "encoder"
        executor = self._executor(name, info, captures=bool(info.states) and self._provider.captures, keeps=not once)
        prefix = "" if name == "decoder" else f"{name}."
        mover = GraphMoves(self._memory, lambda move: self._executor(f"{prefix}{move}", info, captures=False))
        return DeviceGraph(name, info, executor, self._memory, mover, slots_given, once)

    def _executor(self, name: str, info: GraphInfo, captures: bool, keeps: bool = True) -> SessionExecutor:
        """Raises EngineError for a graph that the engine was not built with."""
        assert self.built is not None
        built, folder = self.built
        if name not in built.graphs:
            raise EngineError(
                f"{folder} was built without {name}. Fix: headstart build {self.bundle.path} --device cuda --force."
            )

        def open_as(captured: bool) -> Any:
            provider = self._provider if captured else self._provider.uncaptured()
            return open_session(folder / built.graphs[name], self.threads, provider=provider)

        return SessionExecutor(name, info, open_as, self._provider.location, captures, keeps)

    def features(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """[samples] of a recording to the encoder's input: the samples themselves where there is no front-end."""
        if "frontend" not in self.bundle.manifest.graphs:
            return samples
        features: NDArray[np.float32] = self.graph("frontend").run({contract.AUDIO: samples[None]})[contract.INPUT_FEATURES][0]
        return features

    def encode(self, sources: Sequence[NDArray[Any]]) -> CrossState:
        """One source at a time, so that its states never depend on the others'; then padded to the longest."""
        reads = self.bundle.manifest.graphs["decoder"]
        names = [tensor.name for tensor in reads.inputs if tensor.name in source_names(reads) - {contract.ENCODER_MASK}]
        states = [self._last_source.encoded(source, self._encode) for source in sources]
        hidden, *buffers = (
            _padded([_stored(outputs, name) for outputs in states]) for name in (contract.ENCODER_HIDDEN, *names)
        )
        lengths = [_stored(outputs, contract.ENCODER_HIDDEN).shape[1] for outputs in states]
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        return CrossState(tuple(names), tuple(buffers), mask, hidden.astype(np.float32, copy=False))

    def _encode(self, source: NDArray[Any]) -> Outputs:
        return self.graph("encoder").run(self._encoder_inputs(source))

    def _encoder_inputs(self, source: NDArray[Any]) -> dict[str, NDArray[Any]]:
        info = self.bundle.manifest.graphs["encoder"].inputs[0]
        shape, limit = info.shape[1:], self.model.max_source
        if len(shape) != source.ndim or any(isinstance(n, int) and n != m for n, m in zip(shape, source.shape, strict=True)):
            raise PromptError(f"The source has the shape {list(source.shape)}; {self.model.architecture} takes {list(shape)}.")
        length = next((m for n, m in zip(shape, source.shape, strict=True) if isinstance(n, str)), 0)
        if limit and length > limit:
            raise PromptError(f"The source has {length} tokens or frames, and {self.model.architecture} takes at most {limit}.")
        inputs = {info.name: np.ascontiguousarray(source, info.dtype)[None]}
        return inputs | ({contract.ENCODER_MASK: np.ones((1, length), np.bool_)} if self.model.source == "text" else {})

    def _shared_weight(self, weight: WeightInfo) -> Any:
        import onnxruntime as ort

        key = f"{weight.file}:{weight.offset}"
        if key not in self._shared:
            path = self.bundle.path / weight.file
            array = np.memmap(path, dtype=weight.dtype, mode="r", offset=weight.offset, shape=weight.shape)
            self._shared[key] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        return self._shared[key]


def _usable_cpus() -> int:
    """The cores that this process may run on: containers and `taskset` leave fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stored(outputs: Any, name: str) -> NDArray[Any]:
    """In the graph's own precision: what another graph of the engine reads. Encoders return to the host."""
    assert isinstance(outputs, HostOutputs)
    return outputs.arrays[name]


def _padded(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    """[1, …, E, D] arrays of unequal E as one [B, …, longest E, D], zeros after the shorter ones; a single one as it is."""
    if len(arrays) == 1:
        return arrays[0]
    longest = max(array.shape[-2] for array in arrays)
    result = np.zeros((len(arrays), *arrays[0].shape[1:-2], longest, arrays[0].shape[-1]), arrays[0].dtype)
    for row, array in zip(result, arrays, strict=True):
        row[..., : array.shape[-2], :] = array[0]
    return result


def _check_probe(info: EngineInfo, folder: Path) -> None:
    """An engine built on another machine may hold products that this CPU computes wrongly: ask it."""
    if info.passes.get("integer_products") and float(open_session(folder / info.graphs["probe"], 1).run(None, {})[0]):
        kinds = f"{info.settings['activations']} by {info.settings.get('weights', 'int8')}"
        raise EngineError(
            f"{folder} was built for a CPU that multiplies {kinds} exactly; this one overflows. "
            f"Fix, on this machine: headstart build {folder.parent.parent} --device cpu --force."
        )

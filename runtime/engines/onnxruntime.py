"""The engine on ONNX Runtime, on the CPU or on a GPU: one session per graph; where tensors lie is the memory's business."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, HeadInfo, WeightInfo
from headstart.runtime.cache import CrossState, KVCache
from headstart.runtime.engine import StepOutput
from headstart.runtime.engines.device import DeviceMemory
from headstart.runtime.engines.host import HostMemory
from headstart.runtime.engines.info import EngineInfo, built_engine, engine_folder
from headstart.runtime.engines.provider import CPU, CaptureError, Provider, cuda_provider, open_session
from headstart.runtime.errors import EngineError, PromptError

# Threads of anything that drafts. A second pool of spinning threads would fight the target's for the same cores, which
# cost a verify pass 2.5 times its time on two cores; one thread needs no pool.
DRAFT_THREADS = 1
CUDA_DEVICES = ("cuda", "cuda:tensorrt")  # of which the latter asks the TensorRT provider first


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
        self.threads = threads or os.cpu_count() or 1
        self.built = built
        self._provider = provider
        self._shared: dict[str, Any] = {}
        self._sessions: dict[Path, Any] = {}
        self._frontend: Any = None
        if built is not None:
            _check_probe(*built)
        self._memory = self._new_memory()
        self._session(1)

    @classmethod
    def open(cls, bundle: Bundle, threads: int | None = None, device: str = "cpu") -> "OnnxRuntimeEngine":
        """With what `headstart build --device cpu` made, when it was run, or what it had to make for a GPU. Hashes the files
        that will be read, and no others.

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

    def _new_memory(self) -> HostMemory | DeviceMemory:
        if not self._provider.location:
            return HostMemory(self.bundle)
        assert self.built is not None
        precision = self.built[0].settings["precision"]
        memory = DeviceMemory(self.bundle, precision, self._provider.location, lambda name: self._open(name, name))
        memory.capturing = self._provider.captures
        return memory

    @property
    def exact(self) -> bool:
        """Only the order of summation differs from the checkpoint: neither whole numbers nor half precision on the way."""
        return self.built is None or not (self.built[0].passes.get("integer_products") or "precision" in self.built[0].settings)

    @property
    def _has_fixed_scales(self) -> bool:
        """A canonical graph whose activations are rounded by fixed scales."""
        return self.built is None and self.bundle.manifest.quantization.get("activations") == "static"

    def _session(self, batch: int) -> Any:
        """The session for that many sequences; where batches have a form of their own, it is opened when the first comes."""
        return self._open("decoder", "decoder" if batch == 1 or self._provider.location else "decoder_batch")

    def _open(self, graph: str, name: str) -> Any:
        """The session of a canonical `graph`, or of the engine's file `name` made from it."""
        if self.built is None:
            return self._session_of(self.bundle.path / self.bundle.manifest.graphs[graph].file)
        info, folder = self.built
        return self._session_of(folder / info.graphs[name])

    def _session_of(self, file: Path) -> Any:
        """Opened the first time it is asked for. Only the decoder's passes have few enough shapes to be captured."""
        if file not in self._sessions:
            is_decoder = self.built is not None and file.name == self.built[0].graphs["decoder"]
            provider = self._provider if is_decoder else self._provider.uncaptured()
            try:
                opened = open_session(file, self.threads, provider=provider, as_written=self._has_fixed_scales)
            except CaptureError as error:
                self._stop_capturing(error)
                opened = open_session(file, self.threads, provider=self._provider, as_written=self._has_fixed_scales)
            self._sessions[file] = opened
        return self._sessions[file]

    def features(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the encoder reads of a recording's [samples]: the samples themselves where there is no front-end."""
        frontend = self.bundle.manifest.graphs.get("frontend")
        if frontend is None:
            return samples
        if self._frontend is None:  # of a few operations, on whatever else decodes
            self._frontend = open_session(self.bundle.path / frontend.file, self.threads)
        features: NDArray[np.float32] = self._frontend.run(None, {contract.AUDIO: samples[None]})[0][0]
        return features

    def encode(self, sources: Sequence[NDArray[Any]]) -> CrossState:
        """One source at a time, so that its states never depend on what stands beside it; then padded to the longest."""
        names = [name for info in self.bundle.manifest.cross_caches for name in (info.key_name, info.value_name)]
        wanted = [contract.ENCODER_HIDDEN, *names]
        session, single = self._open("encoder", "encoder"), [self._encoder_inputs(source) for source in sources]
        states = [self._memory.run(session, wanted, inputs) for inputs in single]
        lengths = [outputs[0].shape[1] for outputs in states]
        hidden, *buffers = (_padded([outputs[i] for outputs in states]) for i in range(len(wanted)))
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        return CrossState(tuple(names), tuple(buffers), mask, self._memory.widened(hidden))

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

    def new_cache(self, batch: int, slots: int, cross: CrossState | None = None) -> KVCache:
        return self._memory.new_cache(batch, slots, cross)

    def forward(
        self,
        cache: KVCache,
        token_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        row_mask: NDArray[np.bool_],
        output_rows: NDArray[np.int64],
    ) -> StepOutput:
        rows, chosen = token_ids.shape[1], output_rows.shape[1]
        while True:
            binding = self._memory.binding(self._session(cache.batch), cache, rows, chosen)
            binding.inputs.fill(cache.lengths, token_ids, position_ids, row_mask, output_rows)
            try:
                binding.run()
            except CaptureError as error:
                self._stop_capturing(error)
            else:
                return binding.output(rows, chosen)

    def _stop_capturing(self, error: CaptureError) -> None:
        """Go on with a session that launches its kernels one by one; a pass that failed is run again."""
        assert isinstance(self._memory, DeviceMemory)
        text = f"CUDA graphs cannot be used with {self.bundle.path}, decoding goes on without: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        self._provider = self._provider.uncaptured()
        self._memory.capturing = False
        self._sessions.clear()

    def head(self, info: HeadInfo) -> "OnnxRuntimeHead":
        """A session for one draft head; weights it shares with the target are read once for all heads."""
        if self.built is not None:
            engine, folder = self.built
            provider = self._provider.uncaptured()
            session = open_session(folder / engine.graphs[f"heads/{info.name}"], DRAFT_THREADS, provider=provider)
            return OnnxRuntimeHead(session, self._memory)
        shared = {name: self._shared_weight(weight) for name, weight in info.shared.items()}
        return OnnxRuntimeHead(open_session(self.bundle.path / info.graph.file, DRAFT_THREADS, shared), self._memory)

    def _shared_weight(self, weight: WeightInfo) -> Any:
        import onnxruntime as ort

        key = f"{weight.file}:{weight.offset}"
        if key not in self._shared:
            path = self.bundle.path / weight.file
            array = np.memmap(path, dtype=weight.dtype, mode="r", offset=weight.offset, shape=weight.shape)
            self._shared[key] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        return self._shared[key]


class OnnxRuntimeHead:
    """One draft head."""

    def __init__(self, session: Any, memory: HostMemory | DeviceMemory) -> None:
        self._session, self._memory = session, memory

    def propose(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        ids, log_probs = self._memory.run(self._session, ("topk_ids", "topk_log_probs"), {"hidden": hidden})
        return ids, self._memory.widened(log_probs)


def _padded(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    """[1, …, E, D] arrays of unequal E as one [B, …, longest E, D], zeros behind."""
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

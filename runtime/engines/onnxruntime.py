"""The engine on ONNX Runtime: one session per graph, caches bound in place, bindings reused.

Measured facts it relies on: `OrtValue.ortvalue_from_numpy` shares the array's memory; building an IO binding costs more
than a small model's layer; a single row takes another attention path than two, so one row is padded to two and every
row is computed the same way however many stand beside it.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, HeadInfo, WeightInfo
from headstart.runtime.cache import CrossState, KVCache
from headstart.runtime.engine import StepOutput
from headstart.runtime.engines.info import EngineInfo, built_engine, engine_folder
from headstart.runtime.errors import EngineError, PromptError, missing_extra

MIN_ROWS = 2
# Threads of anything that drafts. A second pool of spinning threads would fight the target's for the same cores, which
# cost a verify pass 2.5 times its time on two cores; one thread needs no pool.
DRAFT_THREADS = 1
OLDEST = (1, 25)  # the first ONNX Runtime whose CPU provider has TensorScatter


class OnnxRuntimeEngine:
    """The bundle's graphs on the CPU provider: as built for it, else the canonical ones as they are."""

    def __init__(self, bundle: Bundle, threads: int | None = None, built: tuple[EngineInfo, Path] | None = None) -> None:
        """`built`: an engine and its folder; None is the canonical graph."""
        self.bundle = bundle
        self.model = bundle.manifest.model
        self.device = "cpu"
        self.threads = threads or os.cpu_count() or 1
        self.built = built
        self._shared: dict[str, Any] = {}
        self._sessions: dict[Path, Any] = {}
        if built is not None:
            _check_probe(*built)
        self._session(1)

    @classmethod
    def open(cls, bundle: Bundle, threads: int | None = None) -> "OnnxRuntimeEngine":
        """With what `headstart build --device cpu` made, when it was run. Hashes the files that will be read, and no others.

        Raises EngineError when the built engine is stale, BundleError when a file was edited.
        """
        info = built_engine(bundle, "cpu")
        bundle.check_hashes(unread=info.replaced() if info else ())
        return cls(bundle, threads, None if info is None else (info, engine_folder(bundle, "cpu")))

    @property
    def exact(self) -> bool:
        """No activation is rounded to whole numbers on the way: only the order of summation differs from the checkpoint."""
        return self.built is None or not self.built[0].passes.get("integer_products")

    @property
    def _has_fixed_scales(self) -> bool:
        """A canonical graph whose activations are rounded by fixed scales."""
        return self.built is None and self.bundle.manifest.quantization.get("activations") == "static"

    def _session(self, batch: int) -> Any:
        """The session for that many sequences; the form for batches is opened when the first batch comes."""
        return self._open("decoder", "decoder" if batch == 1 else "decoder_batch")

    def _open(self, graph: str, name: str) -> Any:
        """The session of a canonical `graph`, or of the engine's file `name` made from it."""
        file = self.bundle.path / self.bundle.manifest.graphs[graph].file
        if self.built is not None:
            info, folder = self.built
            file = folder / info.graphs[name]
        return self._session_of(file)

    def _session_of(self, file: Path) -> Any:
        """Opened the first time it is asked for."""
        if file not in self._sessions:
            self._sessions[file] = open_session(file, self.threads, as_written=self._has_fixed_scales)
        return self._sessions[file]

    def features(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the encoder reads of a recording's [samples]: the samples themselves where there is no front-end."""
        frontend = self.bundle.manifest.graphs.get("frontend")
        if frontend is None:
            return samples
        session = self._session_of(self.bundle.path / frontend.file)
        features: NDArray[np.float32] = session.run(None, {contract.AUDIO: samples[None]})[0][0]
        return features

    def encode(self, sources: Sequence[NDArray[Any]]) -> CrossState:
        """One source at a time, so that its states never depend on what stands beside it; then padded to the longest."""
        names = [name for info in self.bundle.manifest.cross_caches for name in (info.key_name, info.value_name)]
        wanted = [contract.ENCODER_HIDDEN, *names]
        session, single = self._open("encoder", "encoder"), [self._encoder_inputs(source) for source in sources]
        states = [session.run(wanted, inputs) for inputs in single]
        lengths = [outputs[0].shape[1] for outputs in states]
        hidden, *buffers = (_padded([outputs[i] for outputs in states]) for i in range(len(wanted)))
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        return CrossState(tuple(names), tuple(buffers), mask, hidden)

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
        return KVCache(self.bundle.manifest.caches, batch, slots + MIN_ROWS, self.model.dtype, cross)

    def forward(
        self,
        cache: KVCache,
        token_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        row_mask: NDArray[np.bool_],
        output_rows: NDArray[np.int64],
    ) -> StepOutput:
        rows = token_ids.shape[1]
        binding = self._binding(cache, max(rows, MIN_ROWS), output_rows.shape[1])
        binding.fill(cache.lengths, token_ids, position_ids, row_mask, output_rows)
        self._session(cache.batch).run_with_iobinding(binding.binding)
        return binding.output(rows)

    def head(self, info: HeadInfo) -> "OnnxRuntimeHead":
        """A session for one draft head; weights it shares with the target are read once for all heads."""
        if self.built is not None:
            engine, folder = self.built
            return OnnxRuntimeHead(open_session(folder / engine.graphs[f"heads/{info.name}"], DRAFT_THREADS))
        shared = {name: self._shared_weight(weight) for name, weight in info.shared.items()}
        return OnnxRuntimeHead(open_session(self.bundle.path / info.graph.file, DRAFT_THREADS, shared))

    def _shared_weight(self, weight: WeightInfo) -> Any:
        import onnxruntime as ort

        key = f"{weight.file}:{weight.offset}"
        if key not in self._shared:
            path = self.bundle.path / weight.file
            array = np.memmap(path, dtype=weight.dtype, mode="r", offset=weight.offset, shape=weight.shape)
            self._shared[key] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        return self._shared[key]

    def _binding(self, cache: KVCache, rows: int, chosen: int) -> "_Binding":
        key = (id(self), rows, chosen)
        if key not in cache.engine_state:
            cache.engine_state[key] = _Binding(self._session(cache.batch), self.bundle, cache, rows, chosen)
        kept: _Binding = cache.engine_state[key]
        return kept


class OnnxRuntimeHead:
    """One draft head."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def propose(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        ids, log_probs = self._session.run(["topk_ids", "topk_log_probs"], {"hidden": hidden})
        return ids, log_probs


class _Binding:
    """The buffers of one shape (B, T, R), bound once to a session and a cache."""

    def __init__(self, session: Any, bundle: Bundle, cache: KVCache, rows: int, chosen: int) -> None:
        model, batch = bundle.manifest.model, cache.batch
        self.inputs: dict[str, NDArray[Any]] = {
            contract.INPUT_IDS: np.zeros((batch, rows), np.int64),
            contract.POSITION_IDS: np.zeros((batch, rows), np.int64),
            contract.ATTENTION_MASK: np.zeros((batch, 1, rows, cache.slots), np.bool_),
            contract.WRITE_INDEX: np.zeros(batch, np.int64),
            contract.OUTPUT_ROWS: np.zeros((batch, chosen), np.int64),
        }
        self.outputs: dict[str, NDArray[Any]] = {
            contract.LOGITS: np.zeros((batch, chosen, model.vocab_size), model.dtype),
            contract.HIDDEN: np.zeros((batch, rows, model.hidden_size), model.dtype),
        }
        if model.aux_layers:
            width = model.hidden_size * len(model.aux_layers)
            self.outputs[contract.AUX_HIDDEN] = np.zeros((batch, rows, width), model.dtype)
        self.binding = _bind(session, self.inputs, self.outputs, cache)

    def fill(
        self,
        lengths: NDArray[np.int64],
        token_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        row_mask: NDArray[np.bool_],
        output_rows: NDArray[np.int64],
    ) -> None:
        """Write one step's inputs into the bound arrays; a missing second row is a copy of the first that none sees."""
        rows = token_ids.shape[1]
        ids, positions = self.inputs[contract.INPUT_IDS], self.inputs[contract.POSITION_IDS]
        ids[:, :rows], ids[:, rows:] = token_ids, token_ids[:, -1:]
        positions[:, :rows], positions[:, rows:] = position_ids, position_ids[:, -1:]
        self.inputs[contract.WRITE_INDEX][:] = lengths
        self.inputs[contract.OUTPUT_ROWS][:] = output_rows
        self._fill_mask(lengths.tolist(), row_mask)

    def _fill_mask(self, lengths: list[int], row_mask: NDArray[np.bool_]) -> None:
        mask = self.inputs[contract.ATTENTION_MASK]
        rows, padded = row_mask.shape[1], mask.shape[2]
        for index, length in enumerate(lengths):
            plane = mask[index, 0]
            plane[:, :length] = True
            plane[:, length:] = False
            plane[:rows, length : length + rows] = row_mask[index]
            if rows < padded:
                plane[rows:, length + rows] = True  # a row that sees nothing would be 0/0

    def output(self, rows: int) -> StepOutput:
        aux = self.outputs.get(contract.AUX_HIDDEN)
        return StepOutput(
            self.outputs[contract.LOGITS].astype(np.float32, copy=False),
            self.outputs[contract.HIDDEN][:, :rows].astype(np.float32, copy=False),
            None if aux is None else aux[:, :rows].astype(np.float32, copy=False),
        )


def _padded(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    """[1, …, E, D] arrays of unequal E as one [B, …, longest E, D], zeros behind."""
    longest = max(array.shape[-2] for array in arrays)
    result = np.zeros((len(arrays), *arrays[0].shape[1:-2], longest, arrays[0].shape[-1]), arrays[0].dtype)
    for row, array in zip(result, arrays, strict=True):
        row[..., : array.shape[-2], :] = array[0]
    return result


def _bind(session: Any, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]], cache: KVCache) -> Any:
    import onnxruntime as ort

    value = ort.OrtValue.ortvalue_from_numpy
    binding = session.io_binding()
    wanted = {node.name for node in session.get_inputs()}
    for name, array in inputs.items():
        if name in wanted:
            binding.bind_ortvalue_input(name, value(array))
    for name, array in outputs.items():
        binding.bind_ortvalue_output(name, value(array))
    for name, buffer in zip(cache.names, cache.buffers, strict=True):
        shared = value(buffer)  # one buffer in and out: the scatter happens in place
        binding.bind_ortvalue_input(name, shared)
        binding.bind_ortvalue_output(contract.updated(name), shared)
    if cache.cross is not None:
        for name, buffer in zip(cache.cross.names, cache.cross.buffers, strict=True):
            binding.bind_ortvalue_input(name, value(buffer))
        binding.bind_ortvalue_input(contract.ENCODER_MASK, value(cache.cross.mask))
    return binding


def _check_probe(info: EngineInfo, folder: Path) -> None:
    """An engine built on another machine may hold products that this CPU computes wrongly: ask it."""
    if info.passes.get("integer_products") and float(open_session(folder / info.graphs["probe"], 1).run(None, {})[0]):
        raise EngineError(
            f"{folder} was built for a CPU that multiplies {info.settings['activations']} by int8 exactly; this one overflows. "
            f"Fix, on this machine: headstart build {folder.parent.parent} --device cpu --force."
        )


def open_session(file: Path, threads: int, shared: dict[str, Any] | None = None, as_written: bool = False) -> Any:
    """A session on the CPU provider.

    `as_written` keeps ONNX Runtime from making integer products of Q/DQ pairs: those it makes overflow on CPUs without VNNI
    (logits 6 % of their range off, where the graph itself says 3 %). What `headstart build` makes is probed for that instead.
    Raises MissingExtraError without ONNX Runtime, EngineError when it is too old.
    """
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise missing_extra(error, "Decoding on the CPU") from error
    if tuple(map(int, ort.__version__.split(".")[:2])) < OLDEST:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} is too old for the bundle's operators (opset 24): 1.25 or newer is needed. "
            "Fix: pip install -U 'headstart[cpu]', on Python 3.11 or newer."
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if as_written:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if shared:
        options.add_external_initializers(list(shared), list(shared.values()))
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

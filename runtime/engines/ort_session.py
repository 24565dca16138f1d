"""ONNX Runtime's sessions: which of its providers run a graph, and what to say when they cannot."""

import dataclasses
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.bundle import GraphInfo, TensorInfo
from headstart.runtime.errors import EngineError, MissingExtraError, missing_extra

from .step import lowered_info, step_inputs

OLDEST = (1, 25)  # the first ONNX Runtime whose CPU provider has TensorScatter
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
# What computes sizes of tensors: ONNX Runtime keeps that on the CPU on purpose.
SIZE_OPERATORS = {
    "Shape",
    "Concat",
    "Squeeze",
    "Unsqueeze",
    "Gather",
    "Slice",
    "Range",
    "Cast",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Reshape",
}
MIN_ROWS = 2  # of a pass; a single row takes another path through attention than two
AS_WRITTEN = {"session.disable_quant_qdq": "1"}
# By default, the threads of a session spin for 50 ms after a pass, on cores that others need: those of an encoder slowed its
# decoder, for most of a short answer, to 0.6 of its rate. Only a decoder, which soon runs again, stays awake, as long as a head
# may take to draft: woken anew for each pass, its threads cost it 4 to 8 %. Before an LM head with threads of its own it stays
# awake for a tenth of that: 5 ms of its threads' spinning cost the LM head that much, 0.5 ms next to nothing.
RESTS = {"session.force_spinning_stop": "1"}
AWAKE_US, AWAKE_BEFORE_LM_HEAD_US = 5000, 500
# MatMulNBits has a kernel for few rows that reads 4 or 8 bits a weight; without this, more rows than one widen it first.
FEW_ROWS = {"ep.cuda.fpa_intb_gemm": "1"}
RECORDED = {"session.record_ep_graph_assignment_info": "1"}  # so that the session tells which provider has which node


# ONNX's numbers for element types.
ELEMENTS = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}


class CaptureError(Exception):
    """CUDA graphs: a graph cannot be captured, or a pass failed that was to be captured or replayed."""


@dataclass(frozen=True)
class Provider:
    """Who computes, and where the tensors lie.

    Attributes:
        device: as the command line says it.
        options: provider -> its options; what the first cannot take goes to the next.
        entries: of the session's configuration.
        location: ONNX Runtime's name of the device the tensors lie on; "" for numpy's arrays, in the host's memory.
    """

    device: str = "cpu"
    options: dict[str, dict[str, str]] = field(default_factory=lambda: {"CPUExecutionProvider": {}})
    entries: dict[str, str] = field(default_factory=dict)
    location: str = ""

    @property
    def captures(self) -> bool:
        """Passes are captured as CUDA graphs, and replayed."""
        return self.options.get(CUDA, {}).get("enable_cuda_graph") == "1"

    def uncaptured(self) -> "Provider":
        """The same without CUDA graphs."""
        kept = {k: {o: v for o, v in options.items() if o != "enable_cuda_graph"} for k, options in self.options.items()}
        return dataclasses.replace(self, options=kept)


# ONNX Runtime would join residual additions and norms, which takes its CPU kernels longer; see passes/normalization.py.
APART = {"optimization.disable_specified_optimizers": "SkipLayerNormFusion"}
CPU = Provider(entries=APART)


def cuda_provider(device: str, folder: Path) -> Provider:
    """For "cuda", or "cuda:tensorrt", which asks TensorRT first and keeps what that compiles in `folder`.

    Raises EngineError where nothing can be kept.
    """
    options: dict[str, dict[str, str]] = {CUDA: {"device_id": "0", "enable_cuda_graph": "1"}}
    if device != "cuda":
        try:
            folder.mkdir(parents=True, exist_ok=True)  # the provider makes no parents
        except OSError as error:
            raise EngineError(
                f"TensorRT's engines cannot be kept in {folder}: {error.strerror}. Fix: --device cuda."
            ) from error
        # No trt_fp16_enable: the graphs say their types.
        cached = {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}
        places = {"trt_engine_cache_path": str(folder), "trt_timing_cache_path": str(folder)}
        options = {TENSORRT: {"device_id": "0"} | cached | places, CUDA: {"device_id": "0"}}
    return Provider(device, options, FEW_ROWS | RECORDED, "cuda")


def open_session(
    file: Path,
    threads: int,
    shared: dict[str, Any] | None = None,
    provider: Provider = CPU,
    as_written: bool = False,
    awake_us: int = 0,
) -> Any:
    """A session on one provider.

    `shared`: initializers that the file lacks. `awake_us`: microseconds for which its threads spin after a pass. `as_written`
    keeps ONNX Runtime from making integer products of Q/DQ pairs: those it makes overflow on CPUs without VNNI (logits 6 % of
    their range off, where the graph itself says 3 %). What `headstart build` makes is probed for that instead.

    Raises MissingExtraError without ONNX Runtime, EngineError for one that is too old or has not the provider, or without GPU;
    CaptureError for a graph that cannot be captured, where the provider is to.
    """
    ort = _library(provider)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not provider.location:
        # Memory planned for the first pass's shapes is a second block next to that pass's: not for what runs once a source.
        options.enable_mem_pattern = awake_us > 0
    spinning = {"session.intra_op.spin_duration_us": str(awake_us)} if awake_us else RESTS
    entries = spinning | provider.entries | (AS_WRITTEN if as_written else {})
    for entry, value in entries.items():
        options.add_session_config_entry(entry, value)
    if shared:
        options.add_external_initializers(list(shared), list(shared.values()))
    try:
        session = ort.InferenceSession(str(file), options, providers=list(provider.options.items()))
    except Exception as error:  # ONNX Runtime's errors have no common class below it
        if not provider.captures:
            raise
        raise CaptureError(str(error)) from error
    missing = [name for name in provider.options if name not in session.get_providers()]
    if missing:
        raise EngineError(
            f"ONNX Runtime could not start its {missing[0]}: there is no GPU here, or its driver, CUDA or TensorRT are missing "
            "(its own message is above). Fix: run this on a machine with a GPU, or decode with --device cpu."
        )
    if RECORDED.keys() <= provider.entries.keys():
        _warn_of_copies(session, file)
    return session


def onnxruntime_version() -> str:
    """Of the installed package, onnxruntime or onnxruntime-gpu. Raises MissingExtraError without either."""
    return str(_library(CPU).__version__)


def left_on_cpu(session: Any) -> list[str]:
    """Operators of a session on a GPU that run on the CPU all the same, but for those that compute sizes."""
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == "CPUExecutionProvider"]
    return sorted({node.op_type for part in parts for node in part.get_nodes()} - SIZE_OPERATORS)


def _warn_of_copies(session: Any, file: Path) -> None:
    left = left_on_cpu(session)
    if left:
        text = f"ONNX Runtime runs {', '.join(left)} of {file} on the CPU, with copies in every pass: decoding will be slow."
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def _library(provider: Provider) -> Any:
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        if provider.location == "cuda":
            raise MissingExtraError(f"Decoding with {provider.device}", "gpu") from error
        raise missing_extra(error, "Decoding on the CPU") from error
    if tuple(map(int, ort.__version__.split(".")[:2])) < OLDEST:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} is too old for the bundle's operators (opset 24): 1.25 or newer is needed. "
            "Fix: pip install -U 'headstart[cpu]', on Python 3.11 or newer."
        )
    missing = [name for name in provider.options if name not in ort.get_available_providers()]
    if missing:
        raise EngineError(
            f"The ONNX Runtime {ort.__version__} installed here has no {missing[0]}; it has "
            f"{', '.join(ort.get_available_providers())}. The packages onnxruntime (extra cpu) and onnxruntime-gpu (extra gpu) "
            "overwrite each other's files. Fix: pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'headstart[gpu]'."
        )
    if provider.location == "cuda":
        ort.preload_dlls()  # CUDA and cuDNN from NVIDIA's packages, where those are installed
    return ort


@dataclass(frozen=True)
class Opened:
    """A session, and the manifest's description of its graph with the types and inputs that the session has.

    Attributes:
        least_rows: of a pass; the caller pads shorter ones.
    """

    session: Any
    info: GraphInfo
    least_rows: int = MIN_ROWS

    @cached_property
    def steps(self) -> list[TensorInfo]:
        """The inputs that differ from pass to pass."""
        return step_inputs(self.info)


def opened(session: Any, info: GraphInfo, least_rows: int = MIN_ROWS) -> Opened:
    return Opened(session, lowered_info(info, _tensors(session.get_inputs()), _tensors(session.get_outputs())), least_rows)


def _tensors(nodes: Any) -> list[TensorInfo]:
    return [TensorInfo(node.name, element_type(node.type), tuple(node.shape)) for node in nodes]


def element_type(ort_type: str) -> str:
    """numpy's name of ONNX Runtime's "tensor(float16)"."""
    name = ort_type.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def host_value(array: NDArray[Any]) -> Any:
    """A tensor on the array's own memory; bfloat16 goes by its bits, for ONNX Runtime takes no such array."""
    import onnxruntime as ort

    if array.dtype != "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), ELEMENTS["bfloat16"])

"""What an engine will need on a device, predicted before it is built: plan, caches, scratch, and whether all of it fits.

Predicted from the canonical graphs' weights and the caches' sizes alone, in a second and without the builder.
"""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import EngineError, missing_extra
from headstart.runtime.graph import MAX_ROWS

from .devices import Device, device_named
from .passes.rotation import is_rotation
from .passes.values import tensor_of
from .tensorrt.options import LEAST_TOKENS, TensorRtOptions
from .tensorrt.profiles import decoder_profiles

MB = 1e6
# Kernels of one profile, and of one attention layer more in it: fitted to plans of TensorRT-RTX 1.7.1 for sm86.
PROFILE_MB, LAYER_MB = 1.7, 0.15
# What the CUDA context and the library need besides a plan; NVIDIA gives no figure, and 0.5 GB is what Jetson users see.
CONTEXT_MB = 500.0
SYSTEM_MB = 1500.0  # the system itself, where it shares the memory
# Peak of a build: what the smallest takes, and how often it holds each byte of a graph's weights, copies of the parser, the
# builder and the plan, and the file's pages. Fitted to TensorRT-RTX 1.7.1 on models of 2 to 107 M parameters, to within 11 %.
BUILD_MB = 450.0
BUILD_COPIES = {"INT8": 3.6, "INT4": 5.9}
FLOAT_COPIES = 6.6
# Products of floats between quantized ones, as rotations are, load kernels of their own: 45 to 130 on the three samples.
ROTATION_MB = 95.0


@dataclass(frozen=True)
class MemoryPlan:
    """Megabytes (10⁶ bytes) that an engine needs on `device`.

    Attributes:
        weights_mb: of the decoder and the heads, as the plans will hold them.
        kernels_mb: of all profiles.
        cache_mb: of `batch` caches of `cache_slots` each, the longest text and a verify pass; and of their sources.
        cache_mb_per_1000: of one sequence's 1,000 tokens.
        workspace_mb: activations of the largest pass, its logits included.
        context_mb: CUDA and the library.
        available_mb: of the device's memory, after the system's share where that is the same memory.
        build_mb: peak of the build, where it is built on the device itself.
    """

    device: str
    target: str
    weights_mb: float
    kernels_mb: float
    cache_slots: int
    cache_mb: float
    cache_mb_per_1000: float
    workspace_mb: float
    context_mb: float
    available_mb: float
    build_mb: float

    @property
    def needed_mb(self) -> float:
        return self.weights_mb + self.kernels_mb + self.cache_mb + self.workspace_mb + self.context_mb

    @property
    def engine_mb(self) -> float:
        """The plans' files."""
        return self.weights_mb + self.kernels_mb

    @property
    def fits(self) -> bool:
        return self.needed_mb <= self.available_mb


def memory_plan(bundle: str | Path | Bundle, device: str, options: TensorRtOptions) -> MemoryPlan:
    """Predict. Raises OptionError for an unknown device or a cache the model cannot fill."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    board = device_named(device)
    try:
        graphs = _graphs(opened)
    except ModuleNotFoundError as error:
        raise missing_extra(error, "Planning memory") from error
    model, slots = opened.manifest.model, options.slots(opened)
    per_token = (
        2 * sum(cache.kv_heads * (cache.key_size + cache.value_size) for cache in opened.manifest.graphs["decoder"].slots) / MB
    )
    rows = min(options.prefill_rows, options.tokens(opened))
    profiles = len(decoder_profiles(rows))
    return MemoryPlan(
        device=device,
        target=board.target,
        weights_mb=sum(sum(weights.values()) for weights in graphs.values()),
        kernels_mb=profiles * (PROFILE_MB + LAYER_MB * model.layers),
        cache_slots=slots,
        cache_mb=options.batch * (slots * per_token + _source_mb(opened, options)),
        cache_mb_per_1000=1000 * per_token,
        workspace_mb=options.batch * _workspace_mb(opened, rows, slots),
        context_mb=CONTEXT_MB,
        available_mb=_available_mb(board),
        build_mb=BUILD_MB + (ROTATION_MB if _rotates(opened) else 0) + max(_build_mb(weights) for weights in graphs.values()),
    )


def check_fits(bundle: Bundle, device: str, options: TensorRtOptions) -> None:
    """Raises EngineError, with the figures, when the engine would not fit `device`."""
    plan = memory_plan(bundle, device, options)
    if plan.fits:
        return
    spare = plan.available_mb - (plan.needed_mb - plan.cache_mb)
    tokens = int(spare / plan.cache_mb * plan.cache_slots) - MAX_ROWS if spare > 0 else 0
    fix = f"--cache {tokens} or less" if tokens >= LEAST_TOKENS else "fewer bits (headstart quantize), or a larger device"
    raise EngineError(
        f"{bundle.path} does not fit {device}: {plan.needed_mb:.0f} MB are needed (plans {plan.engine_mb:.0f}, cache of "
        f"{plan.cache_slots} slots {plan.cache_mb:.0f}, workspace {plan.workspace_mb:.0f}, CUDA {plan.context_mb:.0f}) and "
        f"{plan.available_mb:.0f} MB are available. Fix: {fix}."
    )


def _graphs(bundle: Bundle) -> dict[str, dict[str, float]]:
    """Graph -> megabytes of its weights by type: half precision (the front-end's in float32), quantized ones as they are.

    A table that is both looked up and multiplied by (tied embeddings) is stored twice, once in each kernel's layout, as the
    plans of TensorRT-RTX 1.7.1 show. A head's copy of the target's LM head counts again.
    """
    from .canonical import load_graph

    megabytes: dict[str, dict[str, float]] = {}
    for name in bundle.graphs:
        weights = megabytes[name] = {}
        for value in load_graph(bundle, name).graph.initializers.values():
            kind, stored = _stored(value, "float32" if name == "frontend" else "half")
            weights[kind] = weights.get(kind, 0.0) + stored / MB
    return megabytes


def _stored(value: ir.Value, floats: str) -> tuple[str, float]:
    """(type, bytes in the plan) of a weight; `floats`: what float32 becomes."""
    tensor, readers = tensor_of(value), {node.op_type for node, _ in value.uses()}
    copies = 2 if "Gather" in readers and len(readers) > 1 and len(tensor.shape) == 2 else 1
    if is_rotation(value):
        copies = len(value.uses())  # each product has its own
    narrowed = tensor.dtype.name == "FLOAT" and floats == "half"
    return tensor.dtype.name, float(copies * (tensor.nbytes / 2 if narrowed else tensor.nbytes))


def _rotates(bundle: Bundle) -> bool:
    return "rotation" in bundle.manifest.quantization


def _build_mb(weights: dict[str, float]) -> float:
    """What one graph adds to the peak. Graphs are built one after the other, so the largest counts."""
    return sum(BUILD_COPIES.get(kind, FLOAT_COPIES) * size for kind, size in weights.items())


def _source_mb(bundle: Bundle, options: TensorRtOptions) -> float:
    """What the decoder reads of one source, and which of its rows exist."""
    reads = bundle.manifest.graphs["decoder"].reads
    if not reads:
        return 0.0
    per_row = sum(pair.kv_heads * (pair.key_size + pair.value_size) for pair in reads)
    return options.source_rows(bundle) * (2 * per_row + 1) / MB


def _workspace_mb(bundle: Bundle, rows: int, slots: int) -> float:
    """Scratch of one sequence: a few layers' activations, the mask, one layer's caches copied for its attention, logits."""
    model = bundle.manifest.model
    widest = 8 * model.hidden_size  # query, key, value and a gated MLP of about three times the hidden size, and their sum
    attention = max(
        (c.kv_heads * (c.key_size + c.value_size) * slots for c in bundle.manifest.graphs["decoder"].slots), default=0
    )
    return 2 * (rows * (widest + slots) + attention + MAX_ROWS * model.vocab_size) / MB


def _available_mb(board: Device) -> float:
    return 1000 * board.memory_gb - (SYSTEM_MB if board.shared else 0.0)

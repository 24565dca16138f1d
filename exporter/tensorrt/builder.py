"""One lowered graph to one plan: parse, add profiles, build. Knows nothing of bundles.

The same calls serve classic TensorRT and TensorRT for RTX; what differs is in `library`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headstart.runtime.engines.info import PlanInfo, Profile
from headstart.runtime.errors import EngineError

from .library import RTX, Library
from .options import BuilderOptions
from .plan import in_place, read_plan

Progress = Callable[[str], None]
MEBIBYTE = 1 << 20


def build_plan(
    file: Path,
    axes: Mapping[str, Sequence[str | int]],
    profiles: Sequence[Profile],
    library: Library,
    options: BuilderOptions,
    progress: Progress,
    module_of: Callable[[str], str] = lambda node: "an unknown module",
) -> PlanInfo:
    """Build the ONNX graph in `file`; the plan is written next to it, with the suffix .plan.

    Args:
        axes: input name -> its axes: sizes, or the names that the profiles give sizes for.
        module_of: node name -> the module of the checkpoint it came from, for messages.

    Raises EngineError when the parser refuses an operator, or the builder the network; OptionError for options the library
    does not have.
    """
    trt = library.module
    library.check(options.version_compatible, options.hardware_compatible)
    log = error_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse(trt, network, file, log, module_of)
    allow_decomposition(trt, network)
    config = builder.create_builder_config()
    _configure(trt, config, options)
    library.configure(config, options.timing_cache)
    config.progress_monitor = _monitor(trt, progress)
    for profile in profiles:
        config.add_optimization_profile(_profile(builder, network, axes, profile))
    started = time.perf_counter()
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise EngineError(_refusal(file, library, options, log.last_error))
    build_s = time.perf_counter() - started
    library.keep_timings(config, options.timing_cache)
    layers = _layers(network)
    with memoryview(built) as plan:
        text = read_plan(plan)
        file.with_suffix(".plan").write_bytes(plan)
        size = plan.nbytes
    return PlanInfo(size, build_s, tuple(profiles), layers, text.kernels, text.weight_bytes, in_place(text))


def _refusal(file: Path, library: Library, options: BuilderOptions, reason: str) -> str:
    fix = "Fix: less --cache or fewer --prefill-rows where it names memory; else report this with the message."
    if library.target.kind == RTX and (options.refit or options.strip_weights):
        fix = "TensorRT for RTX builds plans with exchangeable weights only where there is a GPU. Fix: leave that option out."
    return f"TensorRT {library.version} could not build {file.name} for {library.target.device}: {reason} {fix}"


def error_log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps the errors, which the library only ever prints."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        @property
        def last_error(self) -> str:
            return self.errors[-1] if self.errors else "it gave no reason."

    return Log()


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes the builder's phases on."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = max(num_steps, 1)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(f"{phase_name}: {100 * (step + 1) // self.steps.get(phase_name, 1)} %")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def parse(trt: Any, network: Any, file: Path, log: Any, module_of: Callable[[str], str]) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(file)):
        return
    if not parser.num_errors:
        raise EngineError(f"TensorRT could not read {file.name}: {log.last_error}")
    error = parser.get_error(0)
    raise EngineError(
        f"TensorRT's parser refuses the node {error.node_name() or error.node()} ({error.node_operator() or 'no operator'}) "
        f"of {file.name}, which comes from {module_of(error.node_name())}: {error.code().name}. This architecture cannot "
        "be built for TensorRT with this version; the cpu device can decode it."
    )


def allow_decomposition(trt: Any, network: Any) -> None:
    """Let attention without a kernel of its own, as in encoders of some sizes, be computed in parts, instead of failing.

    Where there is a fused kernel it is used all the same; `PlanInfo.kernels` counts them.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer  # get_layer knows no subclasses; this is how NVIDIA's samples cast
            layer.attention.decomposable = True


def _configure(trt: Any, config: Any, options: BuilderOptions) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 in a graph means more than ten bits of mantissa
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb * MEBIBYTE)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    flags = {
        trt.BuilderFlag.STRIP_PLAN: options.strip_weights,
        trt.BuilderFlag.REFIT: options.refit,
        trt.BuilderFlag.REFIT_IDENTICAL: options.strip_weights and not options.refit,
        trt.BuilderFlag.VERSION_COMPATIBLE: options.version_compatible,
    }
    for flag, wanted in flags.items():
        if wanted:
            config.set_flag(flag)


def _profile(builder: Any, network: Any, axes: Mapping[str, Sequence[str | int]], profile: Profile) -> Any:
    shapes_of = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        unknown = [axis for axis in axes[name] if not isinstance(axis, int) and axis not in profile.sizes]
        if unknown:
            raise EngineError(f"The axis {unknown[0]} of the input {name} has no size that could be fixed: not supported yet.")
        if all(isinstance(axis, int) for axis in axes[name]):
            continue
        shapes = [
            tuple(axis if isinstance(axis, int) else profile.sizes[axis][which] for axis in axes[name]) for which in range(3)
        ]
        shapes_of.set_shape(name, *shapes)
    return shapes_of


def _layers(network: Any) -> dict[str, int]:
    """How many layers of each kind and type the network has."""
    counts: dict[str, int] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        name = layer.type.name.lower()
        if layer.num_outputs and layer.get_output(0) is not None:
            name += f" {type_name(layer.get_output(0).dtype)}"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def type_name(dtype: Any) -> str:
    name = str(dtype.name)
    return {"HALF": "float16", "BF16": "bfloat16", "FLOAT": "float32"}.get(name, name.lower())

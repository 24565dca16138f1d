"""Two libraries with one interface, and all they differ in: TensorRT for RTX, and classic TensorRT.

|                  | trt-rtx (`tensorrt_rtx`)                    | tensorrt (`tensorrt`)                       |
| ---------------- | ------------------------------------------- | ------------------------------------------- |
| comes from       | the package index, extra `trt-rtx`          | JetPack on Jetson, NVIDIA's packages elsewhere |
| builds           | for named GPU generations, no GPU needed    | for the GPU it runs on                      |
| kernels          | finished at load, by a compiler in the library | timed at build, hence the timing cache   |

Everything else in this folder speaks to either.
"""

import importlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.runtime.errors import EngineError, OptionError, missing_extra

RTX, CLASSIC = "trt-rtx", "tensorrt"
MODULES = {RTX: "tensorrt_rtx", CLASSIC: "tensorrt"}
# What to use where TensorRT for RTX has no target.
ELSEWHERE = {
    "sm87": "Jetson Orin",
    "sm90": "H100 and H200",
    "sm100": "B200",
    "sm101": "Jetson Thor, as CUDA 12 called it",
    "sm103": "B300",
    "sm110": "Jetson Thor",
}
# Types that a generation's kernels do not support, as TensorRT-RTX 1.7.1 reports.
NOT_THERE = {"sm75": ("bfloat16", "int4")}


@dataclass(frozen=True)
class TensorRtDevice:
    """What an engine is built for. `generations` are compute capabilities as sm86; none for the GPU of this machine."""

    kind: str
    generations: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        return f"{self.kind}:{','.join(self.generations)}" if self.generations else self.kind


def parse_target(device: str) -> TensorRtDevice:
    """trt-rtx:sm86, trt-rtx:sm86,sm120, trt-rtx:sm86,trt-rtx:sm120, or tensorrt. Raises OptionError for anything else."""
    kind, _, rest = device.partition(":")
    generations = tuple(sorted({part.removeprefix(f"{RTX}:") for part in rest.split(",")} - {""}, key=_number))
    if kind == CLASSIC and rest:
        raise OptionError(f"device {device!r}: classic TensorRT builds for the GPU it runs on. Fix: --device tensorrt.")
    if kind == RTX and not generations:
        raise OptionError(f"device {device!r} names no GPU generation. Fix: --device trt-rtx:sm89, or several, sm86,sm120.")
    wrong = [name for name in generations if not _number(name)]
    if wrong:
        raise OptionError(f"device {device!r}: {wrong[0]!r} is no GPU generation; they are written sm89.")
    return TensorRtDevice(kind, generations)


def _number(generation: str) -> int:
    digits = generation.removeprefix("sm")
    return int(digits) if generation.startswith("sm") and digits.isdigit() else 0


@dataclass(frozen=True)
class Library:
    """An imported library. `module` is typed Any: neither ships type hints."""

    target: TensorRtDevice
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def native(self) -> bool:
        """It has layers for attention and for cache updates; TensorRT 10.3, which JetPack 6 brings, has neither."""
        return hasattr(self.module.INetworkDefinition, "add_kv_cache_update")

    def check(self, version_compatible: bool, hardware_compatible: bool) -> None:
        """Raises OptionError for compatibilities that TensorRT for RTX does not have."""
        if self.target.kind == RTX and version_compatible:
            raise OptionError("--version-compatible: TensorRT for RTX has no lean runtime. Fix: leave it out, and build anew.")
        if self.target.kind == RTX and hardware_compatible:
            raise OptionError("--hardware-compatible: name every generation instead, as in --device trt-rtx:sm86,sm120.")

    def check_types(self, types: Collection[str]) -> None:
        """Raises OptionError for a type of weights or activations that a target generation does not have."""
        for generation in self.target.generations:
            missing = [name for name in NOT_THERE.get(generation, ()) if name in types]
            if missing:
                raise OptionError(f"{generation} has no {missing[0]}. Fix: --precision float16, with float or int8 weights.")

    def configure(self, config: Any, timing_cache: Path | None) -> None:
        """Set what the engine is for; with classic TensorRT, take up the timings of earlier builds on this device."""
        if self.target.kind == RTX:
            config.num_compute_capabilities = len(self.target.generations)
            for index, generation in enumerate(self.target.generations):
                config.set_compute_capability(getattr(self.module.ComputeCapability, generation.upper()), index)
        elif timing_cache is not None:
            known = timing_cache.read_bytes() if timing_cache.is_file() else b""
            config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)

    def keep_timings(self, config: Any, timing_cache: Path | None) -> None:
        """Write the timings of a classic build; TensorRT for RTX measures none."""
        if self.target.kind == CLASSIC and timing_cache is not None:
            timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))


def open_library(target: TensorRtDevice) -> Library:
    """Import what builds for `target`.

    Raises MissingExtraError or EngineError when it is not installed, OptionError for a generation it cannot build for.
    """
    try:
        library = Library(target, importlib.import_module(MODULES[target.kind]))
    except ModuleNotFoundError as error:
        if target.kind == RTX:
            raise missing_extra(error, f"Building for {target.device}") from error
        raise EngineError(
            "The Python package tensorrt is not installed here. JetPack brings it for the system's own Python "
            "(python3-libnvinfer): make the environment with --system-site-packages, see docs/jetson.md. On a machine "
            "without the target's GPU build for trt-rtx instead."
        ) from error
    _check_generations(library)
    return library


def generations(module: Any) -> list[str]:
    """What this version of TensorRT for RTX can build for."""
    return [name.lower() for name in module.ComputeCapability.__members__ if name.startswith("SM")]


def _check_generations(library: Library) -> None:
    if library.target.kind == CLASSIC:
        return
    known = generations(library.module)
    for generation in library.target.generations:
        if generation not in known:
            place = ELSEWHERE.get(generation)
            advice = f" {generation} is {place}: build there, with --device tensorrt." if place else ""
            raise OptionError(
                f"TensorRT for RTX {library.version} cannot build for {generation}. It can for: {', '.join(known)}.{advice}"
            )

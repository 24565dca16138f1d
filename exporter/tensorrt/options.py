"""What is fixed when a bundle is built for TensorRT: sizes, precision, and the builder's own options."""

from dataclasses import dataclass, field
from pathlib import Path

from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import OptionError
from headstart.runtime.graph import MAX_ROWS

from .recordings import source_rows

LEAST_TOKENS = 16
PRECISIONS = ("float16", "bfloat16")


@dataclass(frozen=True)
class BuilderOptions:
    """How a plan is built.

    Attributes:
        workspace_mb: the most scratch memory a kernel may ask for; None leaves it to the library.
        optimization_level: 0 (fastest build) to 5; None is the library's own.
        strip_weights: leave the weights out of the plan; the runtime refits them from the lowered graph, which is then kept
            with it. They must be the weights it was built with: NVIDIA warns of wrong biases for any others (11.3).
        refit: weights can be exchanged in the built engine. TensorRT for RTX needs a GPU for both when building.
        version_compatible: newer versions of the library may load the plan (classic TensorRT).
        hardware_compatible: GPUs newer than the one it is built on may run it (classic TensorRT, Ampere and later).
        timing_cache: file in which classic TensorRT keeps its timings between builds.
    """

    workspace_mb: int | None = None
    optimization_level: int | None = None
    strip_weights: bool = False
    refit: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise OptionError(f"--workspace-mb must be at least 1, got {self.workspace_mb}.")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise OptionError(f"--optimization-level must lie between 0 and 5, got {self.optimization_level}.")


@dataclass(frozen=True)
class TensorRtOptions:
    """What is fixed when a bundle is built for TensorRT.

    Attributes:
        precision: of weights and activations of a float32 bundle; one exported in half precision keeps its own.
        cache: tokens of the longest text; the bundle's own limit by default.
        batch: sequences decoded together.
        prefill_rows: the most prompt tokens of one pass; longer prompts take several.
        source: tokens of the longest source of an encoder that reads text; shorter ones are padded and masked.
        audio_seconds: the longest recording of an encoder that takes any length: 30, or the model's limit where that is less.
        fits: a board of `devices`; the build stops before it begins where the engine would not fit it.
        builder: the builder's own options.
    """

    precision: str = "float16"
    cache: int | None = None
    batch: int = 1
    prefill_rows: int = 512
    source: int = 512
    audio_seconds: float | None = None
    fits: str | None = None
    builder: BuilderOptions = field(default_factory=BuilderOptions)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise OptionError(f"--precision {self.precision!r} is unknown. Choose one of: {', '.join(PRECISIONS)}.")
        if self.batch < 1:
            raise OptionError(f"--batch must be at least 1, got {self.batch}.")
        for name in ("prefill_rows", "source"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")

    def tokens(self, bundle: Bundle) -> int:
        """The longest text. Raises OptionError for one that the model cannot read, or that is too short to use."""
        longest = bundle.manifest.model.max_cache
        tokens = self.cache or longest
        if tokens > longest:
            raise OptionError(f"--cache {tokens} is more than the {longest} tokens that {bundle.path} was exported for.")
        if tokens < LEAST_TOKENS:
            raise OptionError(f"--cache {tokens} is too small: at least {LEAST_TOKENS} tokens are needed.")
        return tokens

    def slots(self, bundle: Bundle) -> int:
        """Of the caches: the text, and after it the rows of the largest verify pass, padding included."""
        return self.tokens(bundle) + MAX_ROWS

    def source_rows(self, bundle: Bundle) -> int:
        """Of the encoder's states. Raises OptionError for recordings longer than the model takes."""
        return source_rows(bundle, self.source, self.audio_seconds)

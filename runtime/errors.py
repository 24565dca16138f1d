"""Every error Headstart raises on purpose.

    HeadstartError
    ├── MissingExtraError        an optional package is not installed
    ├── OptionError              an option or an argument has an invalid value
    ├── PromptError              a prompt that cannot be decoded: empty, or longer than the cache
    ├── AudioError               a recording that cannot be used: empty, truncated, or not a sound file
    ├── BundleError              a bundle that is missing, incomplete, edited, or of another schema
    ├── OutputError              an output that may not be replaced or cannot be written
    ├── CheckpointError          a checkpoint that is missing, truncated, or of an unknown architecture
    ├── HeadError                a draft head that does not fit the model, or whose format is not known
    └── EngineError              an engine that cannot run this bundle

Each message says what was wrong, the rule, what was found, and what to do. The command line prints it without a
traceback and exits with 2.
"""


class HeadstartError(Exception):
    """Root of the tree above."""


class MissingExtraError(HeadstartError):
    """An optional package is missing; the message holds the line that installs it."""

    def __init__(self, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose} needs packages that are not installed. Fix: pip install 'headstart[{extra}]'.")
        self.extra = extra


# Which extra brings a package that the bare install lacks.
_EXTRAS = {
    "onnxruntime": "cpu",
    "tensorrt_rtx": "trt-rtx",
    "cuda": "trt-rtx",
    "soundfile": "audio",
    "soxr": "audio",
    "matplotlib": "bench",
    "scipy": "bench",
} | dict.fromkeys(("torch", "transformers", "optimum", "onnx", "onnx_ir", "safetensors"), "export")


def missing_extra(error: ModuleNotFoundError, purpose: str) -> MissingExtraError:
    """The error to raise in place of `error`, which is raised again when no extra would help."""
    extra = _EXTRAS.get((error.name or "").split(".")[0])
    if extra is None:
        raise error
    return MissingExtraError(purpose, extra)


class OptionError(HeadstartError):
    """An invalid value of an option."""


class PromptError(HeadstartError):
    """A prompt that cannot be decoded."""


class AudioError(HeadstartError):
    """A recording that cannot be used."""


class BundleError(HeadstartError):
    """A bundle that cannot be read."""


class OutputError(HeadstartError):
    """An output that may not be replaced or cannot be written."""


class CheckpointError(HeadstartError):
    """A checkpoint that cannot be exported."""


class HeadError(HeadstartError):
    """A draft head that cannot be used with this model."""


class EngineError(HeadstartError):
    """An engine that cannot run this bundle."""

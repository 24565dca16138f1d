"""How long an engine's recordings may be, in the units of its front-end and its encoder.

Whisper reads windows of one length. Moonshine and Speech2Text read any length, and an engine needs to know the longest.
"""

from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import Profile
from headstart.runtime.engines.sources import axis_size, open_axis
from headstart.runtime.errors import OptionError

from .profiles import FIXED

SECONDS = 30.0  # by default
LEAST_S = 0.1
USUAL = 0.5  # of the longest: what kernels are chosen for
# Of every model that reads any length; used where the bundle has no front-end to state them.
RATE, HOP = 16_000, 160
INSIDE = 2  # frames that a recording of so many hops has fewer, for they lie inside it


def samples(bundle: Bundle, seconds: float | None) -> tuple[int, int, int]:
    """Least, usual and most of a recording of any length. Raises OptionError for more than the model can hear."""
    audio, limit = bundle.manifest.audio, bundle.manifest.model.max_source
    rate, hop = (audio.sampling_rate, audio.hop or 1) if audio else (RATE, 1 if _raw(bundle) else HOP)
    most = limit * hop / rate if limit else float("inf")
    if seconds is not None and not LEAST_S < seconds <= most:
        longest = f" and at most {most:g} s" if limit else ""
        raise OptionError(f"--audio-seconds {seconds:g}: {bundle.path} hears recordings of more than {LEAST_S:g} s{longest}.")
    length = int(min(seconds or SECONDS, most) * rate)
    return int(LEAST_S * rate), int(USUAL * length), length


def _raw(bundle: Bundle) -> bool:
    """The encoder reads the samples themselves."""
    return len(bundle.manifest.graphs["encoder"].inputs[0].shape) == 2


def encoder_sizes(bundle: Bundle, seconds: float | None) -> dict[str, tuple[int, int, int]]:
    """{axis: least, usual, most} of the encoder's input where it takes recordings of any length; else empty."""
    axis = open_axis(bundle.manifest.graphs["encoder"].inputs[0].shape)
    if axis is None:
        return {}
    least, usual, most = samples(bundle, seconds)
    if _raw(bundle):
        return {axis: (least, usual, most)}
    hop = (bundle.manifest.audio.hop if bundle.manifest.audio else None) or HOP
    return {axis: (least // hop - INSIDE, usual // hop, most // hop)}


def encoder_profiles(bundle: Bundle, seconds: float | None) -> tuple[Profile, ...]:
    sizes = encoder_sizes(bundle, seconds)
    return (Profile("any length", dict(sizes)),) if sizes else FIXED


def frontend_profiles(bundle: Bundle, seconds: float | None) -> tuple[Profile, ...]:
    """Of the length of the model's window, or of any up to the longest."""
    audio = bundle.manifest.audio
    if audio is not None and audio.window is not None:
        return (Profile("window", {"samples": (audio.window,) * 3}),)
    return (Profile("any length", {"samples": samples(bundle, seconds)}),)


def source_rows(bundle: Bundle, tokens: int, seconds: float | None) -> int:
    """Of the encoder's states: as its graph fixes them, one a token, or as many as the longest recording makes."""
    graph = bundle.manifest.graphs["encoder"]
    sizes = encoder_sizes(bundle, seconds)
    return axis_size(graph.outputs[0].shape[1], {axis: most for axis, (_, _, most) in sizes.items()} | {"source": tokens})

"""The memory of this process."""

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import psutil


def peak_memory_mb() -> float:
    """The most memory this process ever held, in MB."""
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 1e6
    if sys.platform == "linux":
        # psutil has no peak here, and getrusage's may be the parent's, from before this process ran its own program.
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return next(1024 * int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM:"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def resident_memory_mb() -> float:
    """What this process holds now, in MB."""
    return float(psutil.Process().memory_info().rss) / 1e6


def give_back_freed_memory() -> None:
    """Let glibc return what was freed; a no-op with other C libraries.

    After many small allocations, glibc keeps freed memory: 190 MB after a tokenizer of 262,144 tokens was read.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has no such function
            ctypes.CDLL("libc.so.6").malloc_trim(0)

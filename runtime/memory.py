"""What this process holds in memory, as far as the system tells."""

import sys
from pathlib import Path


def peak_memory_mb() -> float:
    """The most memory this process ever held, in MB; 0 where the system does not tell."""
    held = _told("VmHWM:")  # what getrusage says on Linux may be the parent's, from before it became this program
    if held is not None or sys.platform == "win32":
        return held or 0.0
    import resource

    kibibytes_or_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes_or_bytes / (1e6 if sys.platform == "darwin" else 1e3)


def resident_memory_mb() -> float:
    """What this process holds now, in MB, where the system tells (Linux); else the most it ever held."""
    held = _told("VmRSS:")
    return peak_memory_mb() if held is None else held


def _told(name: str) -> float | None:
    """MB of one line of Linux's account of this process."""
    file = Path("/proc/self/status")
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith(name)), None)

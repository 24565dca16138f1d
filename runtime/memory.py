"""What this process holds in memory, as far as the system tells."""

import sys
from pathlib import Path


def peak_memory_mb() -> float:
    """The most memory this process ever held, in MB; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0.0
    import resource

    kibibytes_or_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes_or_bytes / (1e6 if sys.platform == "darwin" else 1e3)


def resident_memory_mb() -> float:
    """What this process holds now, in MB, where the system tells (Linux); else the most it ever held."""
    file = Path("/proc/self/status")
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    held = next((line.split()[1] for line in lines if line.startswith("VmRSS:")), None)
    return peak_memory_mb() if held is None else int(held) / 1e3

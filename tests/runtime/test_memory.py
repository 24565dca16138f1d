"""Peak and resident memory of a process."""

import subprocess
import sys

import numpy as np
import pytest

from headstart.runtime.memory import peak_memory_mb, resident_memory_mb


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep another account")
def test_the_peak_is_the_process_s_own() -> None:
    """A small child of a large process is small."""
    held = np.ones(40_000_000)
    assert peak_memory_mb() >= resident_memory_mb() > held.nbytes / 1.1e6
    command = "from headstart.runtime.memory import peak_memory_mb; print(peak_memory_mb())"
    child = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    assert 5 < float(child.stdout) < 200

"""What must be there before anything is measured: one environment a rival, one conversion a precision.

Both are made once under the work folder and found again: an environment by its list of packages, a conversion by the
hash of the checkpoint it was made from. Both are made beside their place and marked or moved when they are complete, so
that an interrupted run leaves nothing half done. It does not know what is measured.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from rival_workers.protocol import Rival

HERE = Path(__file__).parent
HASHED = ("config.json", "tokenizer.json", "model.safetensors")
HASHED_IF_THERE = ("generation_config.json", "preprocessor_config.json")


class PreparationError(Exception):
    """An environment or a conversion could not be made; the message is one line."""


class Workshop:
    """The work folder: environments, conversions and logs."""

    def __init__(self, folder: Path, pythons: dict[str, Path], threads: int) -> None:
        self.folder = folder
        self._pythons = pythons
        self._variables = worker_variables(threads)
        self._failures: dict[str, PreparationError] = {}  # what failed once is not tried again for the next mode

    def python(self, rival: Rival) -> Path:
        """The interpreter of a rival's environment, which is made when it is not there."""
        if rival.name in self._pythons:
            return self._pythons[rival.name]
        if not rival.packages:
            return Path(sys.executable)
        home = self.folder / "env" / (rival.shares or rival.name)
        stamp = home / "packages.json"
        if not stamp.is_file() or json.loads(stamp.read_text("utf-8")) != list(rival.packages):
            self._install(rival, home)
            stamp.write_text(json.dumps(rival.packages), "utf-8")
        return home / "bin" / "python"

    def conversion(self, rival: Rival, checkpoint: Path, weights: str) -> Path:
        """The checkpoint in a rival's own format, which is made when it is not there."""
        if not rival.converts:
            return checkpoint
        home = self.folder / "models" / fingerprint(checkpoint, rival) / f"{rival.shares or rival.name}-{weights}"
        if not home.is_dir():
            self._convert(rival, checkpoint, weights, home)
        return home

    def log(self, name: str) -> Path:
        """Where the output of a program of that name goes."""
        folder = self.folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name.replace('/', '-').replace(' ', '_')}.log"

    def _install(self, rival: Rival, home: Path) -> None:
        say(f"installing {' '.join(rival.packages)}")
        if not (home / "bin" / "python").is_file():
            venv.create(home, with_pip=True)
        pip = [str(home / "bin" / "python"), "-m", "pip"]
        self._run(f"install-{rival.name}", [*pip, "install", *rival.packages])
        if rival.unwanted:
            self._run(f"install-{rival.name}-unwanted", [*pip, "uninstall", "-y", *rival.unwanted])

    def _convert(self, rival: Rival, checkpoint: Path, weights: str, home: Path) -> None:
        say(f"converting {checkpoint} for {rival.program}, {weights}")
        started = home.with_name(f"{home.name}.part{os.getpid()}")  # another run may be making the same
        shutil.rmtree(started, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        worker = [str(self.python(rival)), "-m", f"rival_workers.{rival.name}", "convert"]
        self._run(f"convert-{rival.name}-{weights}", [*worker, str(checkpoint.resolve()), weights, str(started.resolve())])
        if home.is_dir():
            shutil.rmtree(started)
        else:
            started.rename(home)

    def _run(self, name: str, command: list[str]) -> None:
        key = " ".join(command)
        if key in self._failures:
            raise self._failures[key]
        log = self.log(name)
        with log.open("wb") as output:
            done = subprocess.run(command, cwd=HERE, env=self._variables, stdout=output, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            self._failures[key] = PreparationError(f"{last_error(log)} (all of it: {log})")
            raise self._failures[key]


def fingerprint(checkpoint: Path, rival: Rival) -> str:
    """Of the files a conversion reads and what makes it: other weights, another folder."""
    digest = hashlib.sha256(json.dumps([rival.packages, rival.recipe]).encode())
    for name in (*HASHED, *(name for name in HASHED_IF_THERE if (checkpoint / name).is_file())):
        with (checkpoint / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def worker_variables(threads: int) -> dict[str, str]:
    """The environment of workers and conversions: nothing is looked up on the network, no pool is larger than asked."""
    pools = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {**os.environ, **pools, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def last_error(log: Path) -> str:
    """The last line that says anything, preferably one that names an error."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["it said nothing"])[-1][:200]


def say(text: str) -> None:
    """Progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)

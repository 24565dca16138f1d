"""Workers that stay alive over all rounds, and the passes they are asked for.

One configuration is one mode of one worker; one pass is one configuration over all prompts; one round is every
configuration once. Only one worker is asked at a time. What else the machine did meanwhile is measured with each pass:
idle workers count as others, so one that spins shows. It does not know how results are shown.
"""

import json
import os
import subprocess
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from preparation import HERE, last_error, worker_variables
from rival_workers.protocol import Setup

START_TIMEOUT_S = 900
REQUEST_TIMEOUT_S = 900
WARM_UP_TOKENS = 16
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class WorkerError(Exception):
    """A worker ended, kept silent for too long, or answered with an error."""


@dataclass(frozen=True)
class Prompt:
    """What is read. With a sound file in `audio`, `token_ids` is what the decoder starts from, and `text` a name.

    `kind` is the class of prompts it belongs to, empty where there is only one.
    """

    text: str
    token_ids: list[int]
    audio: str | None = None
    kind: str = ""


@dataclass(frozen=True)
class Pass:
    """One configuration over all prompts. `others_share`: CPU used by other processes, of all cores."""

    token_ids: list[list[int]]
    prefill_s: list[float]
    decode_s: list[float]
    forwards: list[int | None]
    others_share: float


@dataclass
class Configuration:
    """A row of the table to be. `error` is set where it could not be measured."""

    rival: str
    program: str
    weights: str
    mode: str
    version: str = "?"
    load_s: float | None = None
    resident_mb: float | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    perplexity: float | None = None

    @property
    def name(self) -> str:
        return f"{self.rival}/{self.weights}/{self.mode}"


class Worker:
    """One process with one loaded model."""

    def __init__(self, rival: str, python: Path, setup: Setup, log: Path) -> None:
        self._command = [str(python), "-m", f"rival_workers.{rival}", "serve", json.dumps(asdict(setup))]
        self._variables = worker_variables(setup.threads)
        self._log = log
        self.ends = setup.ends
        self.name = log.stem
        self._process: subprocess.Popen[str] | None = None
        self.ready: dict[str, Any] = {}

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start, load and say hello; nothing to do where it is alive."""
        if self.alive:
            return
        with self._log.open("wb") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            self._process = subprocess.Popen(self._command, cwd=HERE, env=self._variables, **pipes)  # type: ignore[call-overload]
        self.ready = self._read(START_TIMEOUT_S)

    def ask(self, mode: str, prompt: Prompt, new_tokens: int) -> dict[str, Any]:
        """One generation; WorkerError where it failed, or is not as long as asked and was not to end by itself."""
        assert self._process is not None and self._process.stdin is not None
        what = {"prompt": prompt.text, "prompt_ids": prompt.token_ids, "audio": prompt.audio}
        try:
            self._process.stdin.write(json.dumps({"mode": mode, **what, "new_tokens": new_tokens}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"ended: {last_error(self._log)}") from error
        answer = self._read(REQUEST_TIMEOUT_S)
        made = len(answer["token_ids"])
        if made != new_tokens and not (self.ends and 0 < made < new_tokens):
            raise WorkerError(f"{made} tokens instead of {new_tokens}")
        return answer

    def perplexity(self, windows: list[list[int]]) -> float | None:
        """Of texts that are given; None where the program does not tell its logits."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps({"windows": windows}) + "\n")
        self._process.stdin.flush()
        found: float | None = self._read(REQUEST_TIMEOUT_S)["perplexity"]
        return found

    def stop(self) -> None:
        """End the process; the answer to closing its input, or by force."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def cpu_s(self) -> float:
        """Processor time so far, of all its threads."""
        assert self._process is not None
        return _cpu_s(self._process.pid)

    def resident_mb(self) -> float:
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text("utf-8")
        return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0) / 1024

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        # Killing the silent worker ends its output, which ends the reading: no second thread touches the pipe.
        timer = threading.Timer(timeout_s, self._process.kill)
        timer.start()
        started = time.perf_counter()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            late = time.perf_counter() - started >= timeout_s
            raise WorkerError(f"no answer in {timeout_s} s" if late else f"ended: {last_error(self._log)}")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise WorkerError(message["error"])
        return message


def warm_up(worker: Worker, mode: str, prompt: Prompt) -> None:
    """One short generation: the first one allocates, compiles and packs weights."""
    worker.ask(mode, prompt, WARM_UP_TOKENS)


def measure(worker: Worker, mode: str, prompts: list[Prompt], new_tokens: int) -> Pass:
    """One pass, with what others used of the processor meanwhile."""
    before = _processor(), worker.cpu_s() + _cpu_s(os.getpid())
    answers = [worker.ask(mode, prompt, new_tokens) for prompt in prompts]
    after = _processor(), worker.cpu_s() + _cpu_s(os.getpid())
    busy_s, total_s = (now - then for now, then in zip(after[0], before[0], strict=True))
    others_s = max(0.0, busy_s - (after[1] - before[1]))
    columns = {key: [answer[key] for answer in answers] for key in ("token_ids", "prefill_s", "decode_s", "forwards")}
    if sum(columns["decode_s"]) <= 0 and not worker.ends:  # short texts are measured by the item
        raise WorkerError("decoding took no time: too few tokens for a difference of two generations")
    return Pass(**columns, others_share=others_s / total_s)


def idle_shares(workers: list[Worker], seconds: float = 2.0) -> list[float]:
    """Cores each living worker keeps busy while nobody asks it anything."""
    alive = [worker for worker in workers if worker.alive]
    time.sleep(1.0)  # the last one has just finished
    before = [worker.cpu_s() for worker in alive]
    time.sleep(seconds)
    return [(worker.cpu_s() - then) / seconds for worker, then in zip(alive, before, strict=True)]


def available_mb() -> float:
    """Memory that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1024


def _processor() -> tuple[float, float]:
    """Busy and total seconds of all cores. Time stolen by other machines counts as busy: nobody here could use it."""
    fields = [int(value) for value in Path("/proc/stat").read_text("utf-8").splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / TICKS_PER_S, sum(fields) / TICKS_PER_S


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rsplit(")", 1)[1].split()  # the name may hold spaces
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

"""`tuning/<device>.json`: the measurements of an engine and its drafters on one machine, and the drafter that was chosen.

Schema: the frozen dataclasses below, one JSON object.
"""

import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path

from .budget import Budget, DrafterStats
from .bundle import Bundle
from .documents import from_json
from .engines.info import EngineInfo
from .errors import BundleError, EngineError
from .verify_cost import VerifyCost

TUNING_SCHEMA = 3


@dataclass(frozen=True)
class DrafterTuning:
    """One drafter, measured.

    Attributes:
        rates: acceptance rate per class of node, given that its parent was accepted (see the drafter for its classes).
        draft_ms: median milliseconds of a proposal.
        acceptance_length: new tokens per verify call, with the budget on.
        speedup: tokens/s over plain decoding's, measured with the budget on.
        enough: for a pair, the tokens its first drafter must promise for the second not to be asked.
    """

    rates: tuple[float, ...]
    draft_ms: float
    acceptance_length: float
    speedup: float
    enough: float = 0.0


@dataclass(frozen=True)
class Tuning:
    """Everything `headstart tune` measured. `chosen` is a drafter's name or "none", and `reason` says why.

    `simulated`: costs and speed-ups were predicted for a board that was not available; acceptance was measured.
    `provisional`: t(1, n) of passes that a short list decides, where the bundle has one; `verify` is of whole passes.
    """

    schema_version: int
    device: str
    fingerprint: dict[str, str]
    verify: VerifyCost
    drafters: dict[str, DrafterTuning]
    chosen: str
    reason: str
    max_nodes: int
    prompts: int
    simulated: bool = False
    provisional: VerifyCost | None = None

    def budget(self, drafter: str, stats: DrafterStats) -> Budget:
        """A budget for one sequence with a drafter that was tuned."""
        draft_ms = self.drafters[drafter].draft_ms
        return Budget(lambda nodes, depth: draft_ms, self.max_nodes, stats)


def tuning_file(bundle: Bundle, device: str) -> Path:
    return bundle.path / "tuning" / f"{device.replace(':', '-').replace(',', '-')}.json"


def fingerprint(bundle: Bundle, built: EngineInfo | None, threads: int) -> dict[str, str]:
    """What a measurement depends on: the graphs, how they were built, the threads and the processor."""
    graphs = json.dumps(sorted(bundle.manifest.files.items()))
    engine = "canonical" if built is None else f"{built.created} {json.dumps(sorted(built.builder.items()))}"
    return {
        "graphs": hashlib.sha256(graphs.encode()).hexdigest()[:16],
        "engine": engine,
        "threads": str(threads),
        "processor": processor(),
    }


def processor() -> str:
    """The model's name: /proc/cpuinfo where there is one, else what the platform module knows."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(("model name", "hardware"))]
    return names[0] if names else platform.processor() or platform.machine()


def read_tuning(bundle: Bundle, device: str, built: EngineInfo | None, threads: int) -> Tuning | None:
    """What was tuned for this engine; None when nothing was.

    Raises EngineError when the file is of another engine, machine or number of threads.
    """
    file = tuning_file(bundle, device)
    if not file.is_file():
        return None
    fix = f"Fix: headstart tune {bundle.path} --device {device} --threads {threads} --force, or --untuned."
    try:
        if json.loads(file.read_text("utf-8"))["schema_version"] != TUNING_SCHEMA:
            raise EngineError(f"{file} has another schema version than this Headstart's {TUNING_SCHEMA}. {fix}")
        tuning = from_json(Tuning, file.read_text("utf-8"), str(file))
    except (ValueError, KeyError, TypeError, BundleError) as error:
        raise EngineError(f"{file} is no valid tuning file ({error}). {fix}") from error
    for name, value in fingerprint(bundle, built, threads).items():
        measured = tuning.fingerprint.get(name)
        if measured != value:
            raise EngineError(f"{file} was measured with another engine: its {name} is {measured!r}, here {value!r}. {fix}")
    return tuning

"""On a machine with a GPU: every sample × weights, built for it, held against the CPU engine and timed; one table.

python tests/gpu/table.py [cuda] [SAMPLE…]    NOT YET RUN ON A GPU: none was at hand; its figures are tested with a stand-in.

TensorRT's engines, or with `cuda` ONNX Runtime's CUDA provider.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headstart.calibration.bench import bench
from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.calibration.tune import tune
from headstart.calibration.verification.logits import check_golden
from headstart.calibration.verification.reference import engine_precision
from headstart.exporter.build import build
from headstart.exporter.export import export
from headstart.exporter.golden import read_golden
from headstart.exporter.tensorrt.library import ELSEWHERE
from headstart.runtime.engines.trt_cuda import Cuda
from headstart.runtime.errors import HeadstartError
from headstart.runtime.loading import load
from headstart.runtime.model import Model, Prompt
from headstart.runtime.prompts import read_prompts

CHECKPOINTS = Path(__file__).parent.parent.parent / "samples" / "checkpoints"
SAMPLES = ("pycode", "normalise", "speech")
WEIGHTS = ("float16", "int8", "int4")
RTX_GENERATIONS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
INPUTS, NEW_TOKENS, ROUNDS = 8, 64, 3
SHOWN_ROWS = ("1", "2", "4", "8", "16", "32")
MB = 1 << 20


@dataclass(frozen=True)
class Figures:
    """One model on a device, beside the same model on the CPU.

    Attributes:
        difference: the engine's logits from those of the export, median over rows, in parts of their range.
        equal, of: inputs whose greedy tokens are the CPU engine's.
        plain, speculative: tokens per second; the latter with the drafter that tuning chose.
        verify_ms: a pass of so many rows, behind the longest history that was measured.
        memory_mb: of the device, taken since before the model was opened.
    """

    difference: float
    equal: int
    of: int
    plain: float
    speculative: float
    acceptance: float
    verify_ms: dict[str, float]
    memory_mb: float

    def cells(self) -> str:
        costs = " ".join(f"{self.verify_ms.get(rows, float('nan')):.2f}" for rows in SHOWN_ROWS)
        speeds = f"{self.plain:.0f} | {self.speculative:.0f} | {self.acceptance:.2f}"
        return f"{self.difference:.1e} | {self.equal} of {self.of} | {speeds} | {costs} | {self.memory_mb:.0f}"


def device_here(cuda: Cuda) -> str:
    """What to build for: TensorRT for RTX where it has this GPU, else the classic library."""
    generation = "sm{}{}".format(*cuda.compute_capability())
    if generation not in RTX_GENERATIONS:
        print(f"{generation} ({ELSEWHERE.get(generation, 'not known')}) has no TensorRT for RTX: classic TensorRT")
    return f"trt-rtx:{generation}" if generation in RTX_GENERATIONS else "tensorrt"


def inputs_of(sample: str) -> list[Prompt]:
    """What the sample's model reads."""
    folder = CHECKPOINTS / sample
    if sample == "speech":
        return sorted((folder / "recordings").glob("sentences-*.wav"))[:INPUTS]
    return list(read_prompts(next(folder.glob("held_out*.jsonl")))[:INPUTS])


def figures(model: Model, cpu: Model, inputs: Sequence[Prompt], memory_used: Callable[[], int], before: int) -> Figures:
    """Parity and speed of one model. `memory_used` is asked when everything is open; `before`: what it said at first."""
    check = check_golden(model.engine, read_golden(model.bundle), engine_precision(model.engine))
    equal = sum(_tokens(model, given) == _tokens(cpu, given) for given in inputs)
    measured = bench(model, {"all": inputs}, NEW_TOKENS, ROUNDS, drafters=["auto"])
    plain, drafted = (next(row for row in measured.rows if row.drafter == name) for name in ("none", "auto"))
    return Figures(
        difference=check.median,
        equal=equal,
        of=len(inputs),
        plain=plain.decode_tokens_per_s,
        speculative=drafted.decode_tokens_per_s,
        acceptance=drafted.acceptance_length,
        verify_ms=list(measured.verify_ms.values())[-1],
        memory_mb=(memory_used() - before) / MB,
    )


def _tokens(model: Model, given: Prompt) -> list[int]:
    return model.generate(given, max_new_tokens=NEW_TOKENS, drafter="none", ignore_end=not model.answers).token_ids


def bundles(sample: str, folder: Path) -> dict[str, Path]:
    """Weights -> the sample's bundle, with its heads."""
    checkpoint = CHECKPOINTS / sample
    made = {"float16": export(checkpoint, folder / "float32", [checkpoint / "medusa"]).path}
    for weights in WEIGHTS[1:]:
        made[weights] = quantize(made["float16"], folder / weights, QuantizeOptions(weights=weights)).path
    return made


def rows(sample: str, device: str, cuda: Cuda) -> None:
    """Print a sample's lines; one that fails says why and the others go on."""
    inputs = inputs_of(sample)
    with tempfile.TemporaryDirectory() as folder:
        for weights, bundle in bundles(sample, Path(folder)).items():
            try:
                for one in (device, "cpu"):
                    build(bundle, one)
                tune(bundle, inputs, device)
                before = cuda.memory_used()
                found = figures(load(bundle, device), load(bundle, "cpu"), inputs, cuda.memory_used, before)
                print(f"| {sample} | {weights} | {found.cells()} |", flush=True)
            except HeadstartError as error:
                print(f"| {sample} | {weights} | failed: {error} |", flush=True)


def main() -> None:
    given = sys.argv[1:]
    try:
        cuda = Cuda()
        device = "cuda" if "cuda" in given else device_here(cuda)
    except HeadstartError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    print(f"{device}: greedy tokens against the CPU engine's; t(n) in ms for {', '.join(SHOWN_ROWS)} rows")
    print("| sample | weights | Δlogits | equal texts | plain tok/s | speculative | acceptance | t(n) | device MB |")
    print("| --- " * 9 + "|")
    for sample in [name for name in given if name != "cuda"] or SAMPLES:
        rows(sample, device, cuda)


if __name__ == "__main__":
    main()

"""On a machine with a GPU: build the sample for it, tune, measure, and print one table beside the CPU engine.

python tests/gpu/table.py [BUNDLE [DEVICE]]    DEVICE: TensorRT by default; or cuda.

NOT YET RUN: no GPU was at hand when this was written.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from test_tensorrt import device_here

from headstart.calibration.bench import Bench, bench
from headstart.calibration.tune import tune
from headstart.exporter.build import build
from headstart.exporter.export import export
from headstart.runtime.engines.onnxruntime import OnnxRuntimeEngine
from headstart.runtime.model import load
from headstart.runtime.prefill import prefill
from headstart.runtime.prompts import read_prompts

SAMPLE = Path(__file__).parent.parent.parent / "samples" / "checkpoints" / "pycode"


def measured(bundle: Path, device: str, prompts: list[str]) -> Bench:
    """Tune and measure every drafter on one device."""
    tune(bundle, prompts, device, force=True)
    return bench(load(bundle, device), {"all": prompts})


def logits_difference(bundle: Path, device: str) -> float:
    """Largest |Δlogit| of a prompt against the CPU engine, over the logits' range."""
    opened = load(bundle, "cpu", tuned=False).bundle
    prompt = np.random.default_rng(0).integers(3, opened.manifest.model.vocab_size, 200).tolist()
    found = []
    for engine in (OnnxRuntimeEngine(opened), load(bundle, device, tuned=False).engine):
        found.append(prefill(engine, engine.new_cache(1, 256), prompt).logits.copy())
    return float(np.abs(found[0] - found[1]).max() / np.ptp(found[0]))


def tokens_equal(bundle: Path, device: str, prompts: list[str]) -> int:
    """Prompts whose 64 greedy tokens are the CPU engine's."""
    texts = [
        [
            load(bundle, one, tuned=False).generate(p, max_new_tokens=64, drafter="none", ignore_end=True).token_ids
            for p in prompts
        ]
        for one in (device, "cpu")
    ]
    return sum(here == there for here, there in zip(*texts, strict=True))


def main() -> None:
    device = sys.argv[2] if len(sys.argv) > 2 else device_here()
    prompts = read_prompts(SAMPLE / "held_out_prompts.jsonl")[:8]
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(sys.argv[1]) if len(sys.argv) > 1 else export(SAMPLE, Path(folder) / "bundle", [SAMPLE / "medusa"]).path
        for one in (device, "cpu"):
            build(bundle, one, force=True)
        print(
            f"{device}: logits differ by {logits_difference(bundle, device):.1e} of their range from the cpu engine's; ", end=""
        )
        print(f"{tokens_equal(bundle, device, prompts)} of {len(prompts)} greedy texts are equal")
        print("| device | drafter | tokens/s | × plain | acceptance | round cost |\n| --- | --- | --- | --- | --- | --- |")
        for one in (device, "cpu"):
            result = measured(bundle, one, prompts)
            for row in result.rows:
                speed = f"{row.decode_tokens_per_s:.1f} | {row.speedup:.2f}"
                print(f"| {one} | {row.drafter} | {speed} | {row.acceptance_length:.2f} | {row.round_cost:.2f} |")
            for history, line in result.verify_ms.items():
                print(f"{one}, verify behind {history}: " + ", ".join(f"{rows}: {ms:.2f} ms" for rows, ms in line.items()))
            print(f"{one}: peak host memory {result.peak_memory_mb:.0f} MB")


if __name__ == "__main__":
    main()

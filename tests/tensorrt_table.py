"""Print two tables of engines that TensorRT for RTX builds with no GPU: every architecture × weights, and the shipped samples.

python tests/tensorrt_table.py [--device trt-rtx:sm86] [--keep FOLDER]

Bundles that lie in FOLDER already are not exported again. Each sample is built by a process of its own, whose peak is shown.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from architectures import ARCHITECTURES, ENCODER_DECODERS, save_checkpoint, tiny_model

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.build import build
from headstart.exporter.export import export
from headstart.exporter.tensorrt.options import TensorRtOptions
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.info import EngineInfo, built_engine
from headstart.runtime.errors import HeadstartError

WEIGHTS = ("float16", "int8", "int4")
SAMPLES = ("pycode", "normalise", "speech")
CHECKPOINTS = Path(__file__).parents[1] / "samples" / "checkpoints"
SAMPLES_DEVICE = "trt-rtx:sm86,sm89,sm120"
SOURCE = 256  # tokens
KINDS = ("kv_cache_update", "attention_output", "matrix_multiply", "dequantize", "convolution")


def quantized(bundle: Path, weights: str) -> Path:
    target = bundle if weights == "float16" else bundle.with_name(f"{bundle.name}-{weights}")
    if not target.exists():
        quantize(bundle, target, QuantizeOptions(weights=weights))
    return target


def architecture_row(bundle: Path, device: str) -> str:
    """Megabytes of all plans, of their weights, seconds; or why there is none. Then what of it is native."""
    cells, native = [], "–"
    for weights in WEIGHTS:
        try:
            info = build(quantized(bundle, weights), device, force=True, options=TensorRtOptions(source=SOURCE))
        except HeadstartError as error:
            cells.append(str(error).split(":")[0][:60])
            continue
        plans = info.plans.values()
        stored = sum(sum(plan.weight_bytes.values()) for plan in plans)
        size, seconds = sum(plan.bytes for plan in plans), sum(plan.build_s for plan in plans)
        cells.append(f"{size / 1e6:.1f} MB ({stored / 1e6:.2f}), {seconds:.1f} s")
        native = f"{fused(info, 'decoder')} | {fused(info, 'encoder')} | {len(info.plans['decoder'].in_place)}"
    own = 2 * len(Bundle.load(bundle, check_hashes=False).manifest.graphs["decoder"].slots)
    return f"{' | '.join(cells)} | {native} of {own}"


def fused(info: EngineInfo, graph: str) -> str:
    """Attention kernels of one profile, of how many attention layers; decomposed ones count as layers, too."""
    if graph not in info.plans:
        return "–"
    plan = info.plans[graph]
    found = plan.kernels.get("fused_attention", 0) // max(len(plan.profiles), 1)
    layers = sum(count for kind, count in plan.layers.items() if kind.startswith("attention_output"))
    return f"{found} of {layers + len(plan.decomposed_attention)}"


def sample_rows(bundle: Path) -> list[str]:
    """One row a plan, built by a fresh process."""
    arguments = [str(bundle), "--device", SAMPLES_DEVICE, "--source", str(SOURCE), "--force"]
    subprocess.run([sys.executable, "-m", "headstart", "build", *arguments], check=True, stdout=subprocess.DEVNULL)
    info = built_engine(Bundle.load(bundle), SAMPLES_DEVICE)
    assert info is not None
    rows = []
    for graph, plan in info.plans.items():
        stored = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in sorted(plan.weight_bytes.items()) if size > 5_000)
        layers = [(kind, sum(n for name, n in plan.layers.items() if name.startswith(kind))) for kind in KINDS]
        counts = ", ".join(f"{count} {kind}" for kind, count in layers if count)
        fused_kernels = plan.kernels.get("fused_attention", 0) // max(len(plan.profiles), 1)
        peak = f"{info.peak_memory_mb:.0f}" if graph == "decoder" else ""
        parts = (f"{plan.bytes / 1e6:.1f}", stored, f"{plan.build_s:.1f}", counts, fused_kernels, len(plan.in_place), peak)
        rows.append(f"| {bundle.name} | {graph} | {' | '.join(map(str, parts))} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="trt-rtx:sm86", help="of the architectures")
    parser.add_argument("--keep", type=Path, help="folder for the bundles, used again when it holds them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        print(f"| {args.device} | {' | '.join(WEIGHTS)} | fused, decoder | fused, encoder | caches in place |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name in (*ARCHITECTURES, *ENCODER_DECODERS):
            if not (folder / name).exists():
                export(save_checkpoint(tiny_model(name), folder / "checkpoints" / name), folder / name)
            print(f"| {name} | {architecture_row(folder / name, args.device)} |", flush=True)
        columns = "plan MB | weights MB | s | layers | fused attention | caches in place | peak MB of the build"
        print(f"\n| {SAMPLES_DEVICE} | graph | {columns} |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for name in SAMPLES:
            if not (folder / name).exists():
                export(CHECKPOINTS / name, folder / name, [CHECKPOINTS / name / "medusa"])
            for weights in WEIGHTS:
                print("\n".join(sample_rows(quantized(folder / name, weights))), flush=True)


if __name__ == "__main__":
    main()

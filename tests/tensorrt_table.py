"""Print the table of engines: every architecture × weights, built by TensorRT for RTX with no GPU; sizes and times.

python tests/tensorrt_table.py [trt-rtx:sm86]
"""

import sys
import tempfile
from pathlib import Path

from architectures import ARCHITECTURES, save_checkpoint, tiny_model

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.build import build
from headstart.exporter.export import export
from headstart.runtime.errors import HeadstartError

WEIGHTS = ("float16", "int8", "int4")


def cell(bundle: Path, weights: str, device: str) -> str:
    """Megabytes of the plan, of its weights, seconds; or why there is none."""
    source = bundle
    try:
        if weights != "float16":
            source = bundle.with_name(weights)
            quantize(bundle, source, QuantizeOptions(weights=weights))
        plan = build(source, device).plans["decoder"]
    except HeadstartError as error:
        return str(error).split(":")[0][:60]
    stored = sum(plan.weight_bytes.values())
    return f"{plan.bytes / 1e6:.1f} MB ({stored / 1e6:.2f} weights), {plan.build_s:.1f} s"


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "trt-rtx:sm86"
    print(f"| {device} | {' | '.join(WEIGHTS)} | fused attention | caches in place |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            opened = export(save_checkpoint(tiny_model(name), Path(folder) / "checkpoint"), bundle)
            cells = [cell(bundle, weights, device) for weights in WEIGHTS]
            info = build(bundle, device, force=True)
            layers = opened.manifest.model.layers
            fused = f"{info.passes['fused_attention_layers']} of {layers}"
            print(
                f"| {name} | {' | '.join(cells)} | {fused} | {len(info.plans['decoder'].in_place)} of {2 * layers} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

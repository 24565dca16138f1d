"""Print the parity table: every architecture, exported and run on ONNX Runtime, against transformers in float32.

python tests/parity_table.py
"""

import tempfile
from pathlib import Path

import numpy as np
from architectures import ARCHITECTURES, ENCODER_DECODERS, save_checkpoint, tiny_model

from headstart.exporter.comparison import all_logits, compare_greedy
from headstart.exporter.export import export
from headstart.exporter.golden import decoder_start, read_golden, reference_greedy, reference_logits
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine


def row(name: str, folder: Path) -> str:
    model = tiny_model(name)
    engine = OnnxRuntimeEngine(export(save_checkpoint(model, folder / "checkpoint"), folder / "bundle"))
    ids = np.random.default_rng(1).integers(3, engine.model.vocab_size, (1, 40))
    sources = None
    if name in ENCODER_DECODERS:
        ids[:, 0], sources = decoder_start(model), read_golden(engine.bundle)["sources"][:1]
    source = None if sources is None else sources[0]
    reference = reference_logits(model, ids, sources)[0]
    difference = np.abs(all_logits(engine, ids[0], source) - reference).max()
    greedy = reference_greedy(model, ids[:, :20], 32, sources)[0].tolist()
    equal = "yes" if compare_greedy(engine, ids[0, :20].tolist(), greedy, source) is None else "NO"
    spread = reference.max() - reference.min()
    return f"| {engine.model.architecture} ({name}) | {difference:.1e} | {spread:.1f} | {difference / spread:.1e} | {equal} |"


def main() -> None:
    print("| architecture | max abs(Δlogit) | logits' range | relative | 32 greedy tokens equal |")
    print("| --- | --- | --- | --- | --- |")
    for name in (*ARCHITECTURES, *ENCODER_DECODERS):
        with tempfile.TemporaryDirectory() as folder:
            print(row(name, Path(folder)), flush=True)


if __name__ == "__main__":
    main()

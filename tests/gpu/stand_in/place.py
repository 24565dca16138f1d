"""Which provider gets which nodes of a bundle's engine for cuda, and whether passes of all sizes run. See `make`."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np

from headstart.runtime.loading import load
from headstart.runtime.prefill import run_decoder


def main() -> None:
    for bundle in map(Path, sys.argv[1:]):
        model = load(bundle, "cuda", tuned=False)
        engine, source = model.engine, model.bundle.manifest.model.source
        session = engine._session(1)
        for part in ("CUDAExecutionProvider", "CPUExecutionProvider"):
            mine = [p for p in session.get_provider_graph_assignment_info() if p.ep_name == part]
            print(bundle.name, part, dict(Counter(node.op_type for p in mine for node in p.get_nodes())))
        if source:
            continue
        cache = engine.graph("decoder").new_state(1, 256)
        for rows in (1, 2, 3, 8, 15, 16, 40, 64, 100):
            ids = np.arange(rows)[None]
            run_decoder(engine, cache, ids, ids, np.tri(rows, dtype=np.bool_)[None], ids if rows <= 64 else ids[:, -1:])
        cache.commit(0, [0, 2, 5])
        print(bundle.name, "passes of 1 to 100 rows ran; CUDA graphs in use:", engine._provider.captures)


if __name__ == "__main__":
    main()

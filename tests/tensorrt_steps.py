"""A prefill and a small tree behind it, through a graph lowered for TensorRT, run by ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.exporter.graph import save_graph
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.ort_session import open_session

SLOTS, PROMPT, TREE = 64, 20, 5
FLOAT16_NOISE = 0.02  # of the logits' range: the tiny models' weights are four times as large as trained ones
# A root and a tree of five behind it: two children, two grandchildren, and a child of the second.
PARENTS = (-1, 0, 0, 1, 1, 2)
DEPTHS = np.array([0, 1, 1, 2, 2, 2])


def ancestors() -> NDArray[np.bool_]:
    """[6, 6]: which rows each row sees."""
    mask = np.eye(len(PARENTS), dtype=np.bool_)
    for row, parent in enumerate(PARENTS[1:], 1):
        mask[row] |= mask[parent]
    return mask


def decoder(bundle: Bundle) -> ir.Model:
    return ir.load(bundle.path / bundle.manifest.graphs["decoder"].file)


def run(model: ir.Model, bundle: Bundle, file: Path) -> list[NDArray[np.float32]]:
    """Logits of a prefill and of a small tree behind it."""
    save_graph(model, file)
    session = open_session(file, 1)
    dtype = np.float16 if session.get_inputs()[-1].type == "tensor(float16)" else np.float32
    caches = {}
    for cache in bundle.manifest.graphs["decoder"].slots:
        for name, size in ((cache.key_name, cache.key_size), (cache.value_name, cache.value_size)):
            caches[name] = np.zeros((1, cache.kv_heads, SLOTS, size), dtype)
    ids = np.random.default_rng(5).integers(3, bundle.manifest.model.vocab_size, (1, PROMPT + TREE + 1))
    prefill = step(session, caches, ids[:, :PROMPT], np.arange(PROMPT), np.tri(PROMPT), 0)
    return [prefill, step(session, caches, ids[:, PROMPT:], PROMPT + DEPTHS, ancestors(), PROMPT)]


def step(
    session: object, caches: dict[str, NDArray[np.float32]], ids: NDArray[np.int64], positions: object, rows: object, start: int
) -> NDArray[np.float32]:
    count = ids.shape[1]
    mask = np.zeros((1, 1, count, SLOTS), np.bool_)
    mask[..., :start] = True
    mask[0, 0, :, start : start + count] = np.asarray(rows, np.bool_)
    feeds = {
        contract.INPUT_IDS: ids,
        contract.POSITION_IDS: np.asarray(positions, np.int64)[None],
        contract.ATTENTION_MASK: mask,
        contract.ROW_MASK: np.asarray(rows, np.bool_)[None],
        contract.WRITE_INDEX: np.array([start]),
        contract.OUTPUT_ROWS: np.arange(count)[None],
    }
    wanted = {node.name for node in session.get_inputs()}  # type: ignore[attr-defined]
    names = [contract.LOGITS, *map(contract.updated, caches)]
    outputs = session.run(names, {k: v for k, v in (feeds | caches).items() if k in wanted})  # type: ignore[attr-defined]
    caches.update(zip(caches, outputs[1:], strict=True))
    logits: NDArray[np.float32] = outputs[0].astype(np.float32)
    return logits

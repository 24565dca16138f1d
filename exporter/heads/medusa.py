"""Medusa heads: from any published dialect to one ONNX graph (arXiv 2401.10774).

Per head i: x = h; for each residual block x = x + SiLU(A x + b); logits_i = W_i x. Head i proposes the token i + 2 after
the one whose hidden state h is; the target's own LM head gives the token after it. W_i may be the target's LM head.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.exporter.graph import tensor_infos
from headstart.runtime.bundle import GraphInfo, HeadInfo, Manifest, ModelInfo, WeightInfo, to_json
from headstart.runtime.errors import HeadError

from .builder import GraphBuilder
from .recognise import DIALECTS, HeadCheckpoint, recognise

Array = NDArray[np.float32]
TOP_K = 10  # candidates per head, as published


@dataclass(frozen=True)
class MedusaWeights:
    """K heads of L residual blocks each.

    Attributes:
        block_weights: [K, L, H, H], applied as x @ weight.T.
        block_biases: [K, L, H]; zeros where the dialect has none.
        projections: [K, V, H], or None when all heads project with the target's LM head.
    """

    block_weights: Array
    block_biases: Array
    projections: Array | None

    @property
    def heads(self) -> int:
        return len(self.block_weights)


def medusa_from_checkpoint(checkpoint: HeadCheckpoint, model: ModelInfo) -> MedusaWeights:
    """Collect the heads' tensors and check them against the target.

    Raises HeadError when a tensor is missing, or hidden size or vocabulary are not the target's.
    """
    block, projection = (re.compile(pattern) for pattern in DIALECTS[checkpoint.dialect])
    blocks: dict[tuple[int, int, str], Array] = {}
    projections: dict[int, Array] = {}
    for name, tensor in checkpoint.tensors.items():
        if match := block.fullmatch(name):
            blocks[int(match[1]), int(match[2]), match[3]] = tensor
        elif match := projection.fullmatch(name):
            projections[int(match[1])] = tensor
    heads = _count(checkpoint, "head", {head for head, _, _ in blocks})
    layers = _count(checkpoint, "block", {layer for _, layer, _ in blocks})
    grid = [[_block(checkpoint, blocks, head, layer, model.hidden_size) for layer in range(layers)] for head in range(heads)]
    weights = np.stack([np.stack([weight for weight, _ in row]) for row in grid])
    biases = np.stack([np.stack([bias for _, bias in row]) for row in grid])
    return MedusaWeights(weights, biases, _projections(checkpoint, projections, heads, model))


def _count(checkpoint: HeadCheckpoint, what: str, indices: set[int]) -> int:
    """How many there are, by the tensors themselves: configurations are known to be wrong."""
    if indices != set(range(len(indices))):
        missing = sorted(set(range(max(indices))) - indices)
        raise HeadError(f"{checkpoint.path}: {what} {missing[0]} is missing while {what} {max(indices)} is there.")
    return len(indices)


def _block(
    checkpoint: HeadCheckpoint, blocks: dict[tuple[int, int, str], Array], head: int, layer: int, hidden: int
) -> tuple[Array, Array]:
    weight = blocks.get((head, layer, "weight"))
    if weight is None:
        raise HeadError(f"{checkpoint.path}: the weight of head {head}, block {layer} is missing.")
    if weight.shape != (hidden, hidden):
        raise HeadError(
            f"{checkpoint.path}: head {head} works on hidden size {weight.shape[-1]}, the target has {hidden}. "
            "Fix: heads trained for this very target."
        )
    return weight, blocks.get((head, layer, "bias"), np.zeros(hidden, np.float32))


def _projections(checkpoint: HeadCheckpoint, found: dict[int, Array], heads: int, model: ModelInfo) -> Array | None:
    if not found:  # residual blocks only: the trainer shared the target's LM head
        return None
    if len(found) == 1 and heads > 1 and checkpoint.config.get("original_lm_head"):
        found = dict.fromkeys(range(heads), found[0])  # vLLM's form of one projection for all
    missing = set(range(heads)) - set(found)
    if missing:
        raise HeadError(
            f"{checkpoint.path}: the projection of head {min(missing)} is missing, of {len(found)} others it is there."
        )
    for head in range(heads):
        size, hidden = found[head].shape
        if (size, hidden) != (model.vocab_size, model.hidden_size):
            raise HeadError(
                f"{checkpoint.path}: head {head} projects from hidden size {hidden} onto {size} tokens, the target has "
                f"{model.hidden_size} and {model.vocab_size}. Fix: heads trained for this very target."
            )
    return np.stack([found[head] for head in range(heads)])


def add_head(bundle: Path, manifest: Manifest, folder: Path, name: str | None = None, top_k: int = TOP_K) -> Manifest:
    """Write `heads/<name>/` into a bundle folder; returns the manifest that names it. Does not write the manifest.

    Raises HeadError when the head is of another family or does not fit the target.
    """
    checkpoint = recognise(folder)
    weights = medusa_from_checkpoint(checkpoint, manifest.model)
    name = name or default_name(manifest)
    top_k = min(top_k, manifest.model.vocab_size)
    target = bundle / "heads" / name
    target.mkdir(parents=True)
    shared = _shared_projection(weights, manifest, folder)
    info = HeadInfo(
        name=name,
        family="medusa",
        dialect=checkpoint.dialect,
        hidden_size=manifest.model.hidden_size,
        vocab_size=manifest.model.vocab_size,
        heads=weights.heads,
        top_k=top_k,
        graph=write_graph(weights, shared, target / "head.onnx", f"heads/{name}/head.onnx", top_k),
        shared=shared,
    )
    (target / "head.json").write_text(to_json(info), "utf-8")
    return dataclasses.replace(manifest, heads=(*manifest.heads, name))


def default_name(manifest: Manifest) -> str:
    """medusa, medusa2, medusa3, …: the first that is free."""
    taken = set(manifest.heads)
    return next(name for i in range(1, 1000) if (name := f"medusa{i if i > 1 else ''}") not in taken)


def _shared_projection(weights: MedusaWeights, manifest: Manifest, folder: Path) -> dict[str, WeightInfo]:
    if weights.projections is not None:
        return {}
    if "lm_head" not in manifest.weights:
        raise HeadError(
            f"{folder} projects with the target's LM head, and this target's graph does not show which weight that is."
        )
    return {"lm_head": manifest.weights["lm_head"]}


def write_graph(weights: MedusaWeights, shared: dict[str, WeightInfo], file: Path, name: str, top_k: int) -> GraphInfo:
    """`hidden` [B, 1, H] to `topk_ids` [B, K, k] int64 and `topk_log_probs` [B, K, k] float32."""
    heads, _, hidden, _ = weights.block_weights.shape
    graph = GraphBuilder()
    source = ir.val("hidden", ir.DataType.FLOAT, ("batch", 1, hidden))
    state = graph.node("Transpose", [source], perm=[1, 0, 2])  # [1, B, H]: the heads broadcast over the first axis
    for layer in range(weights.block_weights.shape[1]):
        weight = graph.constant(
            f"block.{layer}.weight", np.ascontiguousarray(weights.block_weights[:, layer].transpose(0, 2, 1))
        )
        bias = graph.constant(f"block.{layer}.bias", weights.block_biases[:, layer, None])
        inner = graph.node("Add", [graph.node("MatMul", [state, weight]), bias])  # [K, B, H]
        state = graph.node("Add", [state, graph.node("Mul", [inner, graph.node("Sigmoid", [inner])])])
    logits = graph.node("MatMul", [state, _projection(graph, weights, shared)])  # [K, B, V]
    log_probs = graph.node("LogSoftmax", [graph.node("Transpose", [logits], perm=[1, 0, 2])], axis=-1)
    values, ids = graph.nodes("TopK", [log_probs, graph.ints("k", [top_k])], 2, axis=-1, largest=1, sorted=1)
    outputs = [
        _output(ids, "topk_ids", ir.DataType.INT64, heads, top_k),
        _output(values, "topk_log_probs", ir.DataType.FLOAT, heads, top_k),
    ]
    graph.save([source], outputs, file)
    return GraphInfo(name, tensor_infos([source]), tensor_infos(outputs))


def _projection(graph: GraphBuilder, weights: MedusaWeights, shared: dict[str, WeightInfo]) -> Any:
    """[K, H, V], or [H, V] for all heads when it is the target's."""
    if weights.projections is not None:
        return graph.constant("projection.weight", np.ascontiguousarray(weights.projections.transpose(0, 2, 1)))
    info = shared["lm_head"]
    value = graph.reference("lm_head", info)
    if info.dtype != "float32":
        value = graph.node("Cast", [value], to=ir.DataType.FLOAT)
    if info.shape[1] == weights.block_weights.shape[2]:  # [V, H], as tied weights are stored
        value = graph.node("Transpose", [value], perm=[1, 0])
    return value


def _output(value: Any, name: str, dtype: ir.DataType, heads: int, top_k: int) -> Any:
    value.name, value.dtype, value.shape = name, dtype, ir.Shape(("batch", heads, top_k))
    return value

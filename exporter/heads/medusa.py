"""Medusa heads: from any published dialect to one ONNX graph (arXiv 2401.10774).

Per head i: x = h; for each residual block x = x + SiLU(A x + b); logits_i = W_i x. The blocks of blockwise parallel decoding
(arXiv 1811.03115) are x = x + B ReLU(A x + a) + b instead. h is the hidden state at some token; the target's own LM head
predicts the next one, and head i the one i + 2 positions ahead. W_i may be the target's LM head.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.exporter.graph import described_graph, tensor_infos
from headstart.exporter.graph_builder import GraphBuilder
from headstart.runtime import contract
from headstart.runtime.bundle import GraphInfo, HeadInfo, ModelInfo
from headstart.runtime.errors import HeadError

from .family import Family, Installation, Reads
from .folder import HeadFolder, Tensors
from .lm_head import Projection, TargetLmHead
from .medusa_dialects import DIALECTS, recognise
from .storage import save_head
from .token_map import token_map_of

Array = NDArray[np.float32]
Blocks = dict[tuple[int, int, str], Array]


@dataclass(frozen=True)
class HeadCheckpoint:
    """The tensors of Medusa heads in one dialect, as float32, and their configuration."""

    path: Path
    dialect: str
    tensors: Tensors
    config: Mapping[str, Any]


def read_checkpoint(folder: HeadFolder, dialect: str) -> HeadCheckpoint:
    """Raises HeadError for a missing or damaged file, and for weights that are NaN or infinite."""
    names = DIALECTS[dialect]
    tensors = folder.tensors("|".join(f"(?:{kind})" for kind in (names.block, names.output, names.projection, names.extra)))
    return HeadCheckpoint(folder.path, dialect, tensors, folder.config)


@dataclass(frozen=True)
class MedusaWeights:
    """K heads of L residual blocks each.

    Attributes:
        block_weights: [K, L, F, H], applied as x @ weight.T; F is H but in blocks of two matrices.
        block_biases: [K, L, F]; zeros where the dialect has none.
        projections: [K, V, H]; [1, V, H] when all heads have one of their own; None when it is the target's LM head.
        outputs: second matrices [K, L, H, F] and biases [K, L, H] of blocks that have them.
        token_map: [V'] the target's ids of the projections' rows, when these cover only a part of the vocabulary. Without
            projections, the rows of the target's LM head.
    """

    block_weights: Array
    block_biases: Array
    projections: Array | None
    token_map: NDArray[np.int64] | None = None
    outputs: tuple[Array, Array] | None = None

    @property
    def heads(self) -> int:
        return len(self.block_weights)


def medusa_from_checkpoint(checkpoint: HeadCheckpoint, model: ModelInfo) -> MedusaWeights:
    """Collect the heads' tensors and check them against the target.

    Raises HeadError when a tensor is missing, or hidden size or vocabulary are not the target's.
    """
    dialect = DIALECTS[checkpoint.dialect]
    blocks, seconds = _blocks(checkpoint, dialect.block), _blocks(checkpoint, dialect.output)
    heads = _count(checkpoint, "head", {head for head, _, _ in blocks})
    layers = _count(checkpoint, "block", {layer for _, layer, _ in blocks})
    hidden = model.hidden_size
    inner = next(len(tensor) for tensor in blocks.values()) if seconds else hidden
    weights, biases = _stacked(checkpoint, blocks, (heads, layers), (inner, hidden))
    outputs = _stacked(checkpoint, seconds, (heads, layers), (hidden, inner)) if seconds else None
    projections = _projections(checkpoint, heads, layers)
    token_map = _token_map(checkpoint, None if projections is None else projections.shape[1], model.vocab_size)
    if projections is not None:
        if token_map is not None and projections.shape[1] == model.vocab_size:
            projections = projections[:, token_map]
        _check_projections(checkpoint, projections, token_map, model)
    return MedusaWeights(weights, biases, projections, token_map, outputs)


def _blocks(checkpoint: HeadCheckpoint, pattern: str) -> Blocks:
    """(head, block, weight or bias) -> tensor; heads are counted from the one that proposes the second token ahead."""
    first = DIALECTS[checkpoint.dialect].first_head
    matches = ((re.fullmatch(pattern, name), tensor) for name, tensor in checkpoint.tensors.items())
    blocks = {(int(m[1]) - first, int(m[2]), m[3]): tensor for m, tensor in matches if m}
    return {key: tensor for key, tensor in blocks.items() if key[0] >= 0}


def _stacked(
    checkpoint: HeadCheckpoint, blocks: Blocks, counts: tuple[int, int], shape: tuple[int, int]
) -> tuple[Array, Array]:
    """Weights [K, L, *shape] and biases [K, L, rows] of K heads of L blocks."""
    heads, layers = counts
    grid = [[_block(checkpoint, blocks, head, layer, shape) for layer in range(layers)] for head in range(heads)]
    weights = np.stack([np.stack([weight for weight, _ in row]) for row in grid])
    return weights, np.stack([np.stack([bias for _, bias in row]) for row in grid])


def _count(checkpoint: HeadCheckpoint, what: str, indices: set[int]) -> int:
    """How many there are, by the tensors themselves: configurations are known to be wrong."""
    if indices != set(range(len(indices))):
        missing = sorted(set(range(max(indices))) - indices)
        raise HeadError(
            f"{checkpoint.path}: {what} {missing[0]} is missing while {what} {max(indices)} is there. Fix: the complete file."
        )
    return len(indices)


def _block(checkpoint: HeadCheckpoint, blocks: Blocks, head: int, layer: int, shape: tuple[int, int]) -> tuple[Array, Array]:
    weight, bias = blocks.get((head, layer, "weight")), blocks.get((head, layer, "bias"))
    if bias is None and not any(part == "bias" for _, _, part in blocks):
        bias = np.zeros(shape[0], np.float32)  # vLLM's form without medusa_fc_bias
    for part, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            raise HeadError(f"{checkpoint.path}: the {part} of head {head}, block {layer} is missing. Fix: the complete file.")
    assert weight is not None and bias is not None
    if weight.shape != shape or bias.shape != shape[:1]:
        size = weight.shape[-1] if weight.shape != shape else len(bias)
        raise HeadError(
            f"{checkpoint.path}: head {head} works on hidden size {size}, the target has {shape[-1]}. "
            "Fix: heads trained for this very target."
        )
    return weight, bias


def _projections(checkpoint: HeadCheckpoint, heads: int, layers: int) -> Array | None:
    """[K, rows, H], or [1, rows, H] for all heads; None when only residual blocks were saved: the target's LM head."""
    single = _single_projection(checkpoint)
    found = {0: single} if single is not None else _projection_per_head(checkpoint, layers)
    if not found:
        return None
    if single is None and set(found) != set(range(heads)):
        head = min(set(found) ^ set(range(heads)))
        what = "blocks" if head in found else "projection"
        raise HeadError(f"{checkpoint.path}: head {head} has no {what}, though others have. Fix: the complete file.")
    if len({tensor.shape for tensor in found.values()}) > 1 or found[0].ndim != 2:
        raise HeadError(f"{checkpoint.path}: the projections are not matrices of one shape. Fix: download the file again.")
    stacked = np.stack([found[head] for head in sorted(found)])
    if checkpoint.dialect == "vllm":  # the others never scale a head's logits, whatever their base does
        stacked *= np.float32(checkpoint.config.get("logit_scale") or 1.0)
    return stacked


def _single_projection(checkpoint: HeadCheckpoint) -> Array | None:
    """vLLM's `original_lm_head`: one projection, saved under one of two names."""
    if checkpoint.dialect != "vllm" or not checkpoint.config.get("original_lm_head"):
        return None
    by_name = {name.removeprefix("medusa_heads."): tensor for name, tensor in checkpoint.tensors.items()}
    return by_name.get("lm_head.weight", by_name.get("lm_heads.0.weight"))


def _projection_per_head(checkpoint: HeadCheckpoint, layers: int) -> dict[int, Array]:
    found: dict[int, Array] = {}
    for name, tensor in checkpoint.tensors.items():
        if match := re.fullmatch(DIALECTS[checkpoint.dialect].projection, name):
            if match[2] and int(match[2]) != layers:
                raise HeadError(
                    f"{checkpoint.path}: {name} stands after {match[2]} blocks, and {layers} are there. Fix: the complete file."
                )
            found[int(match[1])] = tensor
    return found


def _token_map(checkpoint: HeadCheckpoint, rows: int | None, vocab_size: int) -> NDArray[np.int64] | None:
    """The target's ids of the tokens that are drafted, where these are the most frequent only.

    `rows`: of the projections; None where these are the target's LM head.
    """
    stored = next((t for name, t in checkpoint.tensors.items() if name.endswith("token_map")), None)
    size = checkpoint.config.get("truncated_vocab_size") or vocab_size
    if stored is None or (rows == vocab_size and size >= vocab_size):
        return None
    return token_map_of(stored, vocab_size, checkpoint.path)


def _check_projections(
    checkpoint: HeadCheckpoint, projections: Array, token_map: NDArray[np.int64] | None, model: ModelInfo
) -> None:
    _, rows, hidden = projections.shape
    wanted = model.vocab_size if token_map is None else len(token_map)
    if (rows, hidden) != (wanted, model.hidden_size):
        listed = "" if token_map is None else f", of which token_map lists {wanted}"
        raise HeadError(
            f"{checkpoint.path}: the heads project from hidden size {hidden} onto {rows} tokens, the target has "
            f"{model.hidden_size} and {model.vocab_size}{listed}. Fix: heads trained for this very target."
        )


def to_graphs(folder: HeadFolder, dialect: str, target: Installation) -> HeadInfo:
    """One graph: `hidden` to each head's best candidates. Raises HeadError when the heads do not fit the target."""
    model = target.model
    weights = medusa_from_checkpoint(read_checkpoint(folder, dialect), model)
    lm_head = TargetLmHead.of(target, weights.token_map, folder.path) if weights.projections is None else None
    candidates = min(target.top_k, model.vocab_size if weights.token_map is None else len(weights.token_map))
    graph = write_graph(weights, lm_head, target.folder / "head.onnx", target.file("head.onnx"), candidates)
    return HeadInfo(
        name=target.name,
        family="medusa",
        dialect=dialect,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        heads=weights.heads,
        top_k=candidates,
        graph=graph,
        shared=lm_head.shared if lm_head is not None else {},
    )


def write_graph(weights: MedusaWeights, lm_head: TargetLmHead | None, file: Path, name: str, top_k: int) -> GraphInfo:
    """`hidden` [B, 1, H] to `topk_ids` [B, K, k] int64 and `topk_log_probs` [B, K, k] float32.

    `lm_head`: what the heads project with that have no projections of their own.
    """
    heads, layers, _, hidden = weights.block_weights.shape
    graph = GraphBuilder()
    source = ir.val("hidden", ir.DataType.FLOAT, ("batch", 1, hidden))
    state = graph.node("Transpose", [source], perm=[1, 0, 2])  # [1, B, H]: the heads broadcast over the first axis
    for layer in range(layers):
        inner = _first_block(graph, weights, source) if layer == 0 else _later_block(graph, weights, state, layer)
        state = graph.node("Add", [state, _activated(graph, weights, inner, layer)])  # [K, B, H]
    logits = _own_logits(graph, weights, state) if lm_head is None else Projection(graph, lm_head).logits(state)  # [K, B, V]
    log_probs = graph.node("LogSoftmax", [graph.node("Transpose", [logits], perm=[1, 0, 2])], axis=-1)
    values, ids = graph.nodes("TopK", [log_probs, graph.ints("k", [top_k])], 2, axis=-1, largest=1, sorted=1)
    if weights.token_map is not None:
        ids = graph.node("Gather", [graph.constant("token_map", weights.token_map), ids])
    outputs = [
        _output(ids, contract.TOPK_IDS, ir.DataType.INT64, heads, top_k),
        _output(values, contract.TOPK_LOG_PROBS, ir.DataType.FLOAT, heads, top_k),
    ]
    save_head(graph.model([source], outputs, "head"), file)
    return described_graph(name, tensor_infos([source]), tensor_infos(outputs))


def _first_block(graph: GraphBuilder, weights: MedusaWeights, source: Any) -> Any:
    """[K, B, F]: all heads read the same state, so their first block is one linear layer with K · F outputs."""
    heads, _, inner, hidden = weights.block_weights.shape
    joined = np.ascontiguousarray(weights.block_weights[:, 0].reshape(heads * inner, hidden).T)
    product = graph.node("MatMul", [source, graph.constant("block.0.weight", joined)])  # [B, 1, K · F]
    biased = graph.node("Add", [product, graph.constant("block.0.bias", weights.block_biases[:, 0].reshape(-1))])
    split = graph.node("Reshape", [biased, graph.ints("per_head", [-1, heads, inner])])
    return graph.node("Transpose", [split], perm=[1, 0, 2])


def _activated(graph: GraphBuilder, weights: MedusaWeights, inner: Any, layer: int) -> Any:
    """[K, B, F] to [K, B, H]: SiLU, or ReLU and the second matrix."""
    if weights.outputs is None:
        return graph.node("Mul", [inner, graph.node("Sigmoid", [inner])])
    matrices, biases = weights.outputs
    second = np.ascontiguousarray(matrices[:, layer].transpose(0, 2, 1))
    product = graph.node("MatMul", [graph.node("Relu", [inner]), graph.constant(f"block.{layer}.output", second)])
    return graph.node("Add", [product, graph.constant(f"block.{layer}.output_bias", biases[:, layer, None])])


def _later_block(graph: GraphBuilder, weights: MedusaWeights, state: Any, layer: int) -> Any:
    """[K, B, H]: each head its own matrix, in one batched product."""
    weight = np.ascontiguousarray(weights.block_weights[:, layer].transpose(0, 2, 1))
    product = graph.node("MatMul", [state, graph.constant(f"block.{layer}.weight", weight)])
    return graph.node("Add", [product, graph.constant(f"block.{layer}.bias", weights.block_biases[:, layer, None])])


def _own_logits(graph: GraphBuilder, weights: MedusaWeights, state: Any) -> Any:
    """[K, B, H] to [K, B, V], by matrices of their own: [K, H, V], or [1, H, V] for all heads."""
    assert weights.projections is not None
    projection = graph.constant("projection.weight", np.ascontiguousarray(weights.projections.transpose(0, 2, 1)))
    return graph.node("MatMul", [state, projection])


def _output(value: Any, name: str, dtype: ir.DataType, heads: int, top_k: int) -> Any:
    value.name, value.dtype, value.shape = name, dtype, ir.Shape(("batch", heads, top_k))
    return value


FAMILY = Family(recognise, lambda folder, layers: Reads(), to_graphs)

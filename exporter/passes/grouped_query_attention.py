"""TensorScatter + Attention becomes GroupQueryAttention, with the cache in place and, where it can be, fused rotary.

The portable pair reads the cache's whole capacity; GroupQueryAttention reads the history alone. It takes the tree mask as
a bias and positions for its rotary embedding (ONNX Runtime, contrib operators). It serves one sequence at a time: with
history before several rows it refuses batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.runtime import contract

from .head_layout import flat, replace_heads
from .rotary import Rotary, match_rotary, rotary_table
from .surgery import MICROSOFT, Writer, clean, constant_of, in_order, producer, replace_value
from .values import operand, size_of, stated

Pair = tuple[ir.Value, ir.Value]
TABLE_STEP = 8  # the operator takes rotary tables whose width is a multiple of this
MASKED = np.float32(-1e30)  # added to a masked score: its exponential is zero, and no sum overflows


@dataclass(frozen=True)
class _Layer:
    """One attention layer in the portable form."""

    node: ir.Node
    query: ir.Value  # [B, H, T, D]
    key: ir.Value  # [B, G, T, D]
    value: ir.Value
    key_cache: ir.Value  # graph inputs
    value_cache: ir.Value
    key_scatter: ir.Node
    value_scatter: ir.Node
    mask: ir.Value
    scales: tuple[ir.Value, ir.Value] | None = None  # of an int8 cache's keys and values, [G] each

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(query heads, key/value heads, head size)."""
        return size_of(self.query, 1), size_of(self.key_cache, 1), size_of(self.key_cache, 3)


def fuse_attention(model: ir.Model, positions: int) -> tuple[ir.Model, bool]:
    """Rewrite every layer that fits. `positions` is the longest text in tokens: the rotary tables' length."""
    layers = [layer for node in in_order(model) if (layer := _layer(node)) is not None]
    if not layers:
        return model, False
    shared = _Shared(model, layers[0].node, positions)
    for layer in layers:
        _rewrite(model, layer, shared)
    clean(model)
    return model, True


def _layer(node: ir.Node) -> _Layer | None:
    if node.op_type != "Attention" or len(node.inputs) != 4:
        return None
    query, keys, values, mask = (operand(node, index) for index in range(4))
    (keys, key_scale), (values, value_scale) = _stored(keys), _stored(values)
    key_scatter, value_scatter = producer(keys, "TensorScatter"), producer(values, "TensorScatter")
    if key_scatter is None or value_scatter is None:
        return None
    key_cache, value_cache = operand(key_scatter, 0), operand(value_scatter, 0)
    size = size_of(key_cache, 3)
    if not (key_cache.is_graph_input() and size == size_of(value_cache, 3) and size % 8 == 0):
        return None
    key, value = operand(key_scatter, 1), operand(value_scatter, 1)
    scales = None
    if key_scale is not None and value_scale is not None:
        key, value = (_before_rounding(new) for new in (key, value))  # the operator quantizes what it stores
        scales = key_scale, value_scale
    return _Layer(node, query, key, value, key_cache, value_cache, key_scatter, value_scatter, mask, scales)


def _before_rounding(new: ir.Value) -> ir.Value:
    """The floats of which `new` is the quantized form."""
    return operand(stated(new.producer(), f"what computes {new.name}"), 0)


def _stored(read: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """(the updated cache, its scales when it is int8) of what an Attention reads."""
    dequantize = producer(read, "DequantizeLinear")
    return (read, None) if dequantize is None else (operand(dequantize, 0), operand(dequantize, 1))


class _Shared:
    """What all layers read: lengths, biases per mask, rotary tables. Computed once, before the first layer."""

    def __init__(self, model: ir.Model, anchor: ir.Node, positions: int) -> None:
        self.model, self.positions = model, positions
        self._first = anchor
        self._biases: dict[int, ir.Value] = {}
        self._tables: dict[tuple[int, int], tuple[NDArray[np.float32], NDArray[np.float32]] | None] = {}
        inputs = {value.name: value for value in model.graph.inputs}
        write = Writer(model, anchor)
        rows = write.node("Shape", [inputs[contract.INPUT_IDS]], start=1, end=2)
        self._total = write.node("Add", [inputs[contract.WRITE_INDEX], rows])  # [1], history and new rows
        # The operator requires 32-bit lengths: each sequence's last index, and the total.
        last = write.node("Sub", [self._total, write.ints([1])])
        self.last = write.node("Cast", [last], to=ir.DataType.INT32)
        total = write.node("Cast", [self._total], to=ir.DataType.INT32)
        self.total = write.node("Squeeze", [total, write.ints([0])])
        self.position_ids = inputs[contract.POSITION_IDS]

    def bias(self, mask: ir.Value, anchor: ir.Node) -> ir.Value:
        """[B, 1 or H, T, total] float: what is added to the scores, by default 0 where the row may look, else MASKED."""
        key = id(mask)
        if key not in self._biases:
            write = Writer(self.model, anchor)
            seen = write.node("Slice", [mask, write.ints([0]), self._total, write.ints([3])])
            zero, masked = write.constant("zero", np.float32(0)), write.constant("masked", MASKED)
            boolean = mask.dtype == ir.DataType.BOOL
            self._biases[key] = write.node("Where", [seen, zero, masked]) if boolean else seen
        return self._biases[key]

    def tables(self, rotary: Rotary) -> tuple[ir.Value, ir.Value] | None:
        """Initializers with cosines and sines, [positions, D'/2] each."""
        key = (id(rotary.cos), id(rotary.sin))
        if key not in self._tables:
            cos = rotary_table(self.model, rotary.cos, self.positions)
            sin = rotary_table(self.model, rotary.sin, self.positions)
            made = None if cos is None or sin is None else (cos, sin)
            self._tables[key] = made if made is not None and made[0].shape[1] % TABLE_STEP == 0 else None
        kept = self._tables[key]
        if kept is None:
            return None
        write = Writer(self.model, self._first)
        index = list(self._tables).index(key)
        return write.constant(f"rotary_cos.{index}", kept[0]), write.constant(f"rotary_sin.{index}", kept[1])


def _rewrite(model: ir.Model, layer: _Layer, shared: _Shared) -> None:
    heads, kv_heads, size = layer.sizes
    query, key = layer.query, layer.key
    rotary, tables = _rotary(layer, shared)
    if rotary is not None:
        query, key = rotary
    write = Writer(model, layer.node)
    rows = [flat(write, v, n * size) for v, n in ((query, heads), (key, kv_heads), (layer.value, kv_heads))]
    inputs = [*_packed(rows), layer.key_cache, layer.value_cache, shared.last, shared.total]
    inputs += [*(tables or (None, None)), shared.position_ids if tables else None, shared.bias(layer.mask, layer.node)]
    scale = layer.node.attributes.get("scale")
    integers: dict[str, Any] = {}
    if layer.scales is not None:
        inputs += [None, *(_spread(write, scale_of, size) for scale_of in layer.scales)]
        integers = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    out, keys, values = write.nodes(
        "GroupQueryAttention",
        inputs,
        3,
        MICROSOFT,
        num_heads=heads,
        kv_num_heads=kv_heads,
        do_rotary=int(tables is not None),
        scale=size**-0.5 if scale is None else float(scale.value),
        **integers,
    )
    keys.shape, values.shape = layer.key_cache.shape, layer.value_cache.shape
    replace_heads(write, layer.node.outputs[0], out, heads, size)
    replace_value(layer.key_scatter.outputs[0], keys)
    replace_value(layer.value_scatter.outputs[0], values)


def _spread(write: Writer, scale: ir.Value, size: int) -> ir.Value:
    """[1, G, 1, D]: the operator requires a scale for each channel of each head."""
    heads = constant_of(scale)
    assert heads is not None
    return write.constant(f"{scale.name}.channels", np.repeat(heads[None, :, None, None], size, axis=3))


def _rotary(layer: _Layer, shared: _Shared) -> tuple[Pair | None, Pair | None]:
    """((query, key) before their rotary embedding, (cos, sin) tables), or (None, None) when it stays outside."""
    query, key = match_rotary(layer.query), match_rotary(layer.key)
    if query is None or key is None or query.cos is not key.cos or query.sin is not key.sin:
        return None, None
    tables = shared.tables(query)
    return ((query.source, key.source), tables) if tables is not None else (None, None)


def _packed(flat: Sequence[ir.Value]) -> Sequence[ir.Value | None]:
    """[query-key-value, None, None] when the three are the parts of one split; else as they are."""
    split = producer(flat[0], "Split")
    if split is None or len(split.outputs) != 3 or any(a is not b for a, b in zip(flat, split.outputs, strict=True)):
        return flat
    return [split.inputs[0], None, None]


def fused_layers(model: ir.Model) -> int:
    """How many attention layers are GroupQueryAttention."""
    return sum(node.op_type == "GroupQueryAttention" for node in model.graph)

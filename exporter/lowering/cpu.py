"""The recipe for ONNX Runtime's CPU provider: which passes, in which order, and two forms of the decoder.

One sequence decodes through GroupQueryAttention; a batch, which that operator refuses, through the portable attention, which
scans every slot: the runtime keeps no more of them than are used. Everything else is the same, and both forms read one file of
weights. Where tokens are decided provisionally, both end with the hidden states, and the LM head is a graph of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from headstart.exporter.lowering.lm_head import lm_head_of, without_lm_head
from headstart.exporter.passes.gemm import split_gemms
from headstart.exporter.passes.grouped_heads import fold_grouped_heads
from headstart.exporter.passes.grouped_query_attention import fuse_attention, fused_layers
from headstart.exporter.passes.linear import linears
from headstart.exporter.passes.multi_head_attention import fuse_unmasked_attention
from headstart.exporter.passes.normalization import fuse_normalization
from headstart.exporter.passes.packed_linears import pack_linears
from headstart.exporter.passes.per_row_int8 import Product, lower_linears
from headstart.exporter.passes.query_rows import pad_query_rows
from headstart.exporter.passes.rotary_embedding import fuse_rotary

Pass = Callable[[ir.Model], tuple[ir.Model, bool]]


@dataclass
class Lowered:
    """The two forms of a lowered decoder, its LM head where that is a graph of its own, and how many nodes of each kind."""

    single: ir.Model
    batch: ir.Model
    lm_head: ir.Model | None = None
    passes: dict[str, int] = field(default_factory=dict)


def lower_decoder(model: ir.Model, positions: int, product: Product, apart: bool = False) -> Lowered:
    """Lower a canonical decoder.

    `positions`: the longest text; `product`: see `fastest_exact`; `apart`: the LM head becomes a graph of its own.
    """
    quantized = sum(linear.quantized for linear in linears(model))
    for lowering in _common(product):
        model, _ = lowering(model)
    batch = model.clone()
    for lowering in (fuse_rotary, fold_grouped_heads, pad_query_rows):
        batch, _ = lowering(batch)
    single, _ = fuse_attention(model, positions)
    counts = {
        "fused_norms": sum(node.op_type.endswith("LayerNormalization") for node in single.graph),
        "quantized_linears": quantized,
        "integer_products": sum(node.op_type == "MatMulIntegerToFloat" for node in single.graph),
        "fused_attention_layers": fused_layers(single),
    }
    if not apart:
        return Lowered(single, batch, None, counts)
    return Lowered(without_lm_head(single), without_lm_head(batch), lm_head_of(single), counts)


def lower_graph(model: ir.Model, product: Product) -> ir.Model:
    """Lower a graph that keeps no cache: a draft head's, or an encoder's."""
    for lowering in (*_common(product), fuse_unmasked_attention):
        model, _ = lowering(model)
    return model


def _common(product: Product) -> tuple[Pass, ...]:
    return split_gemms, fuse_normalization, pack_linears, lambda model: lower_linears(model, product)

"""Quantized linear layers become MatMulNBits: 4- or 8-bit weights that a GPU's kernel widens on the way to its cores.

ONNX Runtime's CUDA provider has one fast kernel for it that serves one row as well as many (`ep.cuda.fpa_intb_gemm`). Its
rules, read from the source of 1.31 and confirmed by running the provider: blocks of 32 inputs, half-precision scales, no zero
points, outputs a multiple of 32 (8 bits) or 64 (4 bits), and inputs a multiple of 64: with 96 or 160 it accepts the layer, and
fails in the first pass of 15 rows or more. So coarser scales are repeated for every block of 32, which changes no value; where
the inputs do not fit, blocks of 16 keep the layer from that kernel, and the one that widens the whole weight first has it.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .linear import Linear, linears
from .surgery import MICROSOFT, Writer, clean, replace_value
from .values import array_of, dtype_of

FAST_BLOCK, FAST_INPUTS = 32, 64
SLOW_BLOCK = 16
BITS = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}


def pack_weights(model: ir.Model) -> tuple[ir.Model, bool]:
    """Rewrite every quantized linear layer whose blocks MatMulNBits knows. Returns (model, whether anything changed)."""
    found = [linear for linear in linears(model) if linear.quantized and _block(linear)]
    for linear in found:
        _rewrite(model, linear)
    if found:
        clean(model)
    return model, bool(found)


def _block(linear: Linear) -> int:
    """Inputs that share a scale in the rewritten layer; 0 when the layer stays as it is."""
    inputs, scales = linear.shape[0], array_of(linear.required_scales).shape
    block = FAST_BLOCK if inputs % FAST_INPUTS == 0 else SLOW_BLOCK
    group = block if len(scales) == 1 else inputs // (scales[1] if linear.transposed else scales[0])
    return block if linear.weight.dtype in BITS and group % block == 0 else 0


def _rewrite(model: ir.Model, linear: Linear) -> None:
    write, result = Writer(model, linear.node), linear.node.outputs[0]
    (inputs, outputs), block, bits = linear.shape, _block(linear), BITS[dtype_of(linear.weight)]
    weight = write.constant(f"{linear.name}.{bits}bits", packed(linear.values(), block, bits))
    scale = write.constant(f"{linear.name}.block_scale", _scales(linear, block))
    product = write.node(
        "MatMulNBits", [linear.node.inputs[0], weight, scale], MICROSOFT, K=inputs, N=outputs, bits=bits, block_size=block
    )
    product.type, product.shape = result.type, result.shape
    name = result.name
    replace_value(result, product)
    result.name, product.name = f"{name}.replaced", name  # values beyond float16 are known by name


def packed(values: NDArray[np.int8], block: int, bits: int) -> NDArray[np.uint8]:
    """[K, N] integers as [N, blocks, block · bits / 8] bytes, shifted by half the range; two 4-bit ones to a byte."""
    zero = 1 << (bits - 1)
    shifted = (values.T.astype(np.int16) + zero).astype(np.uint8)
    shifted = np.pad(shifted, ((0, 0), (0, -shifted.shape[1] % block)), constant_values=zero)
    if bits == 4:
        shifted = shifted[:, 0::2] | shifted[:, 1::2] << 4
    return np.ascontiguousarray(shifted.reshape(len(shifted), -1, block * bits // 8))


def _scales(linear: Linear, block: int) -> NDArray[Any]:
    """[N, blocks] in the type the layer is scaled in."""
    scales = np.asarray(array_of(linear.required_scales))
    blocks = -(-linear.shape[0] // block)
    if scales.ndim == 1:
        return np.ascontiguousarray(np.repeat(scales[:, None], blocks, axis=1))
    scales = scales if linear.transposed else scales.T
    return np.ascontiguousarray(np.repeat(scales, blocks // scales.shape[1], axis=1))

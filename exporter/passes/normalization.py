"""Norms and the residual additions before them become one node each.

RMSNorm arrives as six element-wise nodes; ONNX Runtime computes it, together with the addition, in one
(SimplifiedLayerNormalization, SkipSimplifiedLayerNormalization, SkipLayerNormalization). The patterns are onnxscript's.
"""

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions import rms_normalization, skip_normalization


def fuse_normalization(model: ir.Model) -> tuple[ir.Model, bool]:
    """Returns (model, whether anything changed)."""
    changed = rms_normalization.fuse_rms_normalization(model)
    changed += skip_normalization.fuse_skip_rms_normalization(model)
    changed += skip_normalization.fuse_skip_layer_normalization(model)
    return model, bool(changed)

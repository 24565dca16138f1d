"""RMS norms become one node each for ONNX Runtime's CPU provider: they arrive as six element-wise ones.

The pattern is onnxscript's. The residual addition before a norm stays a node of its own: the provider's operators for both
take longer than the two apart. SkipLayerNormalization: 38 microseconds against 15 for 8 rows of 640 channels, 13 ms against 1.8
for 1,500 rows of 512; SkipSimplifiedLayerNormalization: 6.5 microseconds against 4.3 for 8 rows of 640.
"""

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions import rms_normalization


def fuse_normalization(model: ir.Model) -> tuple[ir.Model, bool]:
    """Returns (model, whether anything changed)."""
    return model, bool(rms_normalization.fuse_rms_normalization(model))

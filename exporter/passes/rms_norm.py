"""RMS norms become one standard node each, whose own attribute makes it sum in float32.

They arrive as six element-wise nodes. In half precision their squares overflow; RMSNormalization (ONNX opset 23) keeps them
in `stash_type`. The pattern is onnxscript's.
"""

import onnx_ir as ir
from onnxscript.rewriter.rules.fusion import _rms_normalization


def fuse_rms_norms(model: ir.Model) -> tuple[ir.Model, bool]:
    """Returns (model, whether anything changed)."""
    return model, bool(_rms_normalization.fuse_rms_normalization(model))

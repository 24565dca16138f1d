"""RMS norms become one standard node each, which says itself that it sums in float32.

They arrive as six element-wise nodes. In half precision their squares overflow; RMSNormalization (ONNX opset 23) keeps them
in `stash_type`. The pattern is onnxscript's.
"""

from typing import Any

from onnxscript.rewriter.rules.fusion import _rms_normalization


def fuse_rms_norms(model: Any) -> tuple[Any, bool]:
    """Returns (model, whether anything changed)."""
    return model, bool(_rms_normalization.fuse_rms_normalization(model))

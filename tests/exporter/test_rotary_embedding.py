"""The batch form's rotary embeddings are one operator each, and turn what the seven operations before them turned."""

from collections.abc import Callable

import onnx_ir as ir
import pytest

from headstart.exporter.passes.rotary_embedding import fuse_rotary
from headstart.runtime.bundle import Bundle

BundleOf = Callable[[str], Bundle]


@pytest.mark.parametrize(("name", "fused"), [("llama", 4), ("gemma3", 4), ("phi3", 4), ("gpt_neox", 4), ("gpt2", 0)])
def test_every_layer_turns_query_and_key_by_one_operator(bundle_of: BundleOf, name: str, fused: int) -> None:
    """Two layers; partial embeddings turn the part. That logits stay is what every build checks of the form for batches."""
    bundle = bundle_of(name)
    model, changed = fuse_rotary(ir.load(bundle.path / bundle.manifest.graphs["decoder"].file))
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("RotaryEmbedding") == fused and changed == bool(fused)
    assert not fused or "Neg" not in kinds

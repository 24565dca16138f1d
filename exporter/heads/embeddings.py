"""Where a target's token embeddings lie, for heads that read tokens: found by what its graph does with `input_ids`."""

import dataclasses
from pathlib import Path

import onnx_ir as ir

from headstart.exporter.graph import weight_info
from headstart.exporter.passes.rotation import rotation_of
from headstart.runtime import contract
from headstart.runtime.bundle import WeightInfo
from headstart.runtime.token_rows import EMBEDDINGS

DECODER = "graphs/decoder.onnx"
SCALE = f"{EMBEDDINGS}.scale"


def embeddings_of(bundle: Path) -> dict[str, WeightInfo]:
    """ "embeddings" [V, H], and "embeddings.scale" [V] of a quantized table, in the bundle in that folder.

    Empty where the decoder looks nothing up by `input_ids`, or something else than rows of one table.
    """
    model = ir.load(bundle / DECODER)
    ids = next((value for value in model.graph.inputs if value.name == contract.INPUT_IDS), None)
    lookups = {} if ids is None else {len(one.shape): (one, node) for node in ids.consumers() if (one := _table(node))}
    if sorted(lookups) not in ([2], [1, 2]):
        return {}
    folder, (table, gather) = Path(DECODER).parent.as_posix(), lookups[2]
    infos = {EMBEDDINGS: dataclasses.replace(weight_info(table, folder), rotation=_rotation_after(gather.outputs[0]))}
    return infos | ({SCALE: weight_info(lookups[1][0], folder)} if 1 in lookups else {})


def _table(node: ir.Node) -> ir.ExternalTensor | None:
    """What the node looks rows up in."""
    value = node.inputs[0] if node.op_type == "Gather" else None
    tensor = value.const_value if value is not None else None
    return tensor if isinstance(tensor, ir.ExternalTensor) else None


def _rotation_after(value: ir.Value) -> int:
    """The block of the rotation that what was looked up goes through first, but for what dequantizes it; 0 for none."""
    users = value.consumers()
    while len(users) == 1 and users[0].op_type in ("Cast", "Mul", "Reshape", "MatMul"):
        value = users[0].outputs[0]
        if users[0].op_type == "Reshape" and rotation_of(value):
            return rotation_of(value)
        users = value.consumers()
    return 0

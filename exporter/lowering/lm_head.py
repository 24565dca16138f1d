"""A decoder without its LM head, and the LM head as a graph of its own, so that they can be run at different times.

With a large vocabulary the LM head is most of a pass, and takes little longer for eight rows than for one. A runtime that
decides tokens provisionally, with a short list of the vocabulary, runs it once for several passes (see `runtime.shortlist`).
"""

import onnx_ir as ir
from onnx_ir.convenience import extract

from headstart.exporter.passes.values import operand, size_of, stated
from headstart.runtime import contract
from headstart.runtime.errors import EngineError


def without_lm_head(model: ir.Model) -> ir.Model:
    """A lowered decoder that ends with its hidden states: neither `logits` nor `output_rows`."""
    inputs = [value for value in model.graph.inputs if value.name != contract.OUTPUT_ROWS]
    outputs = [value for value in model.graph.outputs if value.name != contract.LOGITS]
    return _part(model, inputs, outputs)


def lm_head_of(model: ir.Model) -> ir.Model:
    """`hidden` [B, R, H] to `logits` [B, R, V], of a lowered decoder.

    Raises EngineError for a decoder whose logits are not computed from rows of its hidden states alone.
    """
    logits = next(value for value in model.graph.outputs if value.name == contract.LOGITS)
    rows = stated(
        next((node.outputs[0] for node in model.graph if _chooses_rows(node)), None), "which hidden states the LM head reads"
    )
    try:
        head = _part(model, [rows], [logits])
    except ValueError as error:
        raise EngineError(f"The LM head reads more than the hidden states: {error}") from error
    head.graph.inputs[0].name = contract.HIDDEN
    head.graph.inputs[0].shape = ir.Shape((contract.BATCH, contract.CHOSEN, size_of(rows, -1)))
    return head


def _chooses_rows(node: ir.Node) -> bool:
    return node.op_type == "GatherElements" and operand(node, 0).name == contract.HIDDEN


def _part(model: ir.Model, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    return ir.Model(extract(model.graph, inputs=inputs, outputs=outputs), ir_version=model.ir_version)

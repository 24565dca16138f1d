"""Rotates what the linear layers of a float graph read, and their weights with it: the graph computes the same."""

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.exporter.passes.linear import Linear, embedding_tables, is_lm_head, linears
from headstart.exporter.passes.rotation import block_of, rotate
from headstart.exporter.passes.surgery import Writer, only_user, own_initializer, producer
from headstart.exporter.passes.values import array_of, name_of, operand, shape_of, size_of
from headstart.runtime.hadamard import rotated_rows


def rotate_layers(model: Any, vocab_size: int, lm_head: bool, tables: Collection[str] = ()) -> set[str]:
    """Every linear layer whose inputs a block divides, in place; layers that read the same value share its rotation.

    Args:
        lm_head: that too.
        tables: names of embedding tables that are rotated in another graph, which shares them.

    Returns the names of the embedding tables that were rotated, because the LM head is tied to them: what is looked up there is
    rotated back.
    """
    layers = {id(linear.node): linear for linear in linears(model)}
    looked_up = list(embedding_tables(model, vocab_size))
    readers = [linear for linear in layers.values() if block_of(linear.shape[0]) and _only_read_as_rows(linear)]
    readers = [linear for linear in readers if lm_head or not is_lm_head(linear, vocab_size)]
    turned: dict[int, Any] = {}
    for linear in readers:
        if not _rotate_values(linear, layers):
            source = linear.source
            if id(source) not in turned:
                turned[id(source)] = _rotated(model, linear.node, source)
            linear.node.replace_input_with(0, turned[id(source)])
    weights = {name_of(linear.weight): linear for linear in readers}
    for linear in weights.values():
        _rotate_inputs(linear.weight, linear.transposed)
    return _rotate_tables(
        model, [(gather, table) for gather, table in looked_up if name_of(table) in {*weights, *tables}], weights
    )


def _only_read_as_rows(linear: Linear) -> bool:
    """Its weight is read by linear layers and lookups alone, which are rotated with it."""
    uses = [(node.op_type, index) for node, index in linear.weight.uses()]
    return all(use in (("MatMul", 1), ("Transpose", 0), ("Gather", 0)) for use in uses)


def _rotated(model: Any, before: Any, value: Any) -> Any:
    width = size_of(value, -1)
    return rotate(Writer(model, before), value, len(shape_of(value)), width, block_of(width))


def _rotate_inputs(weight: Any, transposed: bool) -> None:
    rows = array_of(weight) if transposed else array_of(weight).T
    turned = rotated_rows(rows, block_of(rows.shape[1]))
    _store(weight, turned if transposed else turned.T)


def _rotate_tables(model: Any, tied: list[tuple[Any, Any]], weights: Collection[str]) -> set[str]:
    """What is looked up in tables that are rotated, here or elsewhere, is rotated back before anything reads it."""
    for table in {id(table): table for _, table in tied if name_of(table) not in weights}.values():
        _rotate_inputs(table, transposed=True)
    for gather, _ in tied:
        result = gather.outputs[0]
        readers = list(result.uses())
        back = _rotated(model, model.graph.node(model.graph.index(gather) + 1), result)
        for node, index in readers:
            node.replace_input_with(index, back)
    return {name_of(table) for _, table in tied}


def _rotate_values(linear: Linear, layers: dict[int, Linear]) -> bool:
    """Of the layer after an attention: rotate the values that this attention adds up, in the layer that computes them.

    Sums of rotated values are rotated, so that nothing is left to do at run time. False where the values come from elsewhere
    (a source's), or where their heads are no whole blocks.
    """
    attention = _attention_before(linear.source)
    found = _value_layer(operand(attention, 2), layers) if attention is not None else None
    if attention is None or found is None or block_of(size_of(attention.outputs[0], -1)) != block_of(linear.shape[0]):
        return False
    layer, addition = found
    block = block_of(linear.shape[0])
    rows = array_of(layer.weight)
    _store(layer.weight, rotated_rows(rows.T, block).T if layer.transposed else rotated_rows(rows, block))
    if addition is not None:
        bias = own_initializer(addition, _constant_operand(addition))
        _store(bias, rotated_rows(array_of(bias), block))
    return True


def _attention_before(source: Any) -> Any | None:
    """The Attention whose heads were joined to `source`, and are read there alone."""
    reshape = producer(source, "Reshape")
    transpose = producer(reshape.inputs[0], "Transpose") if reshape is not None else None
    attention = producer(transpose.inputs[0], "Attention") if transpose is not None else None
    if attention is None or only_user(source) is None or only_user(attention.outputs[0]) is None:
        return None
    return attention


def _value_layer(values: Any, layers: dict[int, Linear]) -> tuple[Linear, Any | None] | None:
    """(the linear layer that computes an attention's values and nothing else, the Add of its bias); None where it is none."""
    scatter = producer(values, "TensorScatter")
    transpose = producer(scatter.inputs[1] if scatter is not None else values, "Transpose")
    reshape = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is None or reshape is None:
        return None
    result = operand(reshape, 0)
    addition = producer(result, "Add")
    if addition is not None and operand(addition, _constant_operand(addition)).is_initializer():
        result = operand(addition, 1 - _constant_operand(addition))
    layer = layers.get(id(result.producer()))
    read_once = all(only_user(value) is not None for value in (transpose.outputs[0], operand(reshape, 0), result))
    return (layer, addition) if layer is not None and read_once and len(layer.weight.uses()) == 1 else None


def _constant_operand(addition: Any) -> int:
    return 0 if operand(addition, 0).is_initializer() else 1


def _store(value: Any, array: NDArray[np.float32]) -> None:
    import onnx_ir as ir

    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)

"""torch's exporter to ONNX, changed in three places: two cost most of its time, and one changes numbers.

What is replaced inside torch and onnxscript is replaced here alone, and only while a module is being translated.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from onnxscript.rewriter import _DEFAULT_REWRITE_RULES
from onnxscript.rewriter._pattern_ir import Constant as PatternConstant
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from headstart.runtime import contract

aten = torch.ops.aten
NOTHING = {aten.detach_.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other}
ASSERTIONS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default}
SYNONYMS = {
    getattr(getattr(aten, f"__{name}__"), other): getattr(getattr(aten, f"bitwise_{name}"), other)
    for name in ("and", "or", "xor")
    for other in ("Tensor", "Scalar")
}

decompose_all = _fx_passes.decompose_with_registry
collect_translations = ONNXRegistry.from_torchlib


def translated(graph: torch.nn.Module, inputs: tuple[Any, ...], axes: tuple[Any, ...]) -> Any:
    """A module as torch's ONNXProgram in the contract's opset; `axes` as torch's `dynamic_shapes`.

    Raises torch.onnx.OnnxExporterError when the module's code has no form as one graph.
    """
    _match_constants_exactly()
    with (
        torch.no_grad(),
        _quiet(),
        _replaced(ONNXRegistry, "from_torchlib", staticmethod(_translations)),
        _replaced(_fx_passes, "decompose_with_registry", decomposed),
    ):
        return torch.onnx.export(
            graph.eval(),
            inputs,
            dynamo=True,
            dynamic_shapes=axes,
            opset_version=contract.OPSET,
            optimize=True,
            verbose=False,
        )


def decomposed(program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
    """The program in operators that torch can translate.

    torch traces each program a second time for that, symbolic shapes and all, which is half of an export's time. Models of
    transformers hold casts and nothing else that has to be decomposed, mostly: then rewriting those will do. Where something is
    written in place, a cast may be the copy that keeps its input from being written to.
    """
    if any(_writes(node) for node in program.graph.nodes):
        return decompose_all(program, registry)
    rewrite_casts(program.graph_module)
    if all(_translatable(node, registry) for node in program.graph.nodes):
        return program
    return decompose_all(program, registry)


def rewrite_casts(module: torch.fx.GraphModule) -> None:
    """Casts become the operator that torch translates, Python's `&`, `|` and `^` the operators they are; assertions go."""
    for node in list(module.graph.nodes):
        if node.target in ASSERTIONS:
            module.graph.erase_node(node)
        elif node.target in NOTHING:
            _bypass(module.graph, node)
        elif node.target in SYNONYMS:
            node.target = SYNONYMS[node.target]
        elif node.target in CASTS:
            _rewrite_cast(module.graph, node)
    module.recompile()


def _rewrite_cast(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    value, dtype = node.args[0], node.meta["val"].dtype
    if value.meta["val"].dtype == dtype:
        _bypass(graph, node)
    else:
        node.target, node.args, node.kwargs = aten._to_copy.default, (value,), {"dtype": dtype}


def _bypass(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """A node that changes nothing goes; one that is an output stays, for the program's signature names it."""
    if any(user.op == "output" for user in node.users):
        node.target, node.args, node.kwargs = aten.clone.default, (node.args[0],), {}
        return
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def _translatable(node: torch.fx.Node, registry: ONNXRegistry) -> bool:
    """As it stands. Operators that call graphs are not."""
    if node.op != "call_function":
        return True
    if not isinstance(node.target, torch._ops.OpOverload):  # arithmetic of sizes
        return not isinstance(node.target, torch._ops.HigherOrderOperator)
    return bool(registry.is_registered(node.target))


def _writes(node: torch.fx.Node) -> bool:
    """To one of its inputs."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and node.target not in NOTHING


@functools.cache
def _translations(opset_version: int) -> ONNXRegistry:
    """torch collects them anew for each export, in 0.4 s."""
    return collect_translations(opset_version)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _match_constants_exactly() -> None:
    """The optimizer that runs after translation takes x + 1e-8 for x + 0, which removes the epsilon of some norms."""
    for rule in _DEFAULT_REWRITE_RULES:
        for node in getattr(rule, "_target_pattern", ()):
            for value in node.inputs:
                if isinstance(value, PatternConstant):
                    value._rel_tol = value._abs_tol = 0.0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # It warns about torchvision, treespec internals and axis names, none of which a user can act on.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

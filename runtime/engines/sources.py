"""Sources as an engine with fixed sizes takes them: text padded and masked, recordings as long as they are.

Padding a recording is not exact: Moonshine normalises over all of its time, convolutions look across the end, and neither
asks a mask. So an encoder of recordings of any length keeps that axis open; only its states are padded, and the
decoder's mask hides the rest.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.bundle import GraphInfo
from headstart.runtime.errors import BundleError, PromptError

from .info import PlanInfo

OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def axis_size(axis: int | str, sizes: Mapping[str, int]) -> int:
    """Of an axis as manifests write it: a number, a name, or an expression such as "(samples - 127)//384 - 1".

    Raises BundleError for an expression of anything else.
    """
    if isinstance(axis, int):
        return axis

    def value(node: ast.AST) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in sizes:
                return sizes[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
        raise BundleError(f"The axis {axis!r} has no size that could be told from {dict(sizes)}. Fix: headstart export, again.")

    return value(ast.parse(axis, mode="eval").body)


def open_axis(shape: tuple[int | str, ...]) -> str | None:
    """The axis, other than the batch, whose size depends on the recording; None if every size is fixed."""
    names = [axis for axis in shape[1:] if isinstance(axis, str) and axis != "source"]
    return names[0] if names else None


@dataclass(frozen=True)
class Source:
    """One source for an encoder that was built for states of at most E rows.

    Attributes:
        inputs: the encoder's, but for a mask that it may take.
        rows: of the states it makes.
        mask: [1, E] bool, which of those rows exist.
    """

    inputs: dict[str, NDArray[Any]]
    rows: int
    mask: NDArray[np.bool_]


def read_source(graph: GraphInfo, plan: PlanInfo | None, source: NDArray[Any], most: int) -> Source:
    """Text is padded to `most` rows; features and samples are taken as they are.

    Raises PromptError for a source that the encoder was not built for.
    """
    info = graph.inputs[0]
    if info.dtype == "int64":
        if len(source) > most:
            raise PromptError(
                f"The source has {len(source)} tokens, and the engine takes {most}. Fix: headstart build --source N."
            )
        padded = np.pad(source, (0, most - len(source)))[None].astype(np.int64)
        return Source({info.name: padded}, most, np.arange(most)[None] < len(source))
    shape = info.shape[1:]
    if len(shape) != source.ndim or any(isinstance(n, int) and n != m for n, m in zip(shape, source.shape, strict=True)):
        raise PromptError(f"The source has the shape {list(source.shape)}; the engine takes {list(shape)}.")
    axis, rows = open_axis(info.shape), most
    if axis is not None and plan is not None:
        length = source.shape[shape.index(axis)]
        check_length(plan, axis, length, "frames" if len(shape) > 1 else "samples")
        rows = axis_size(graph.outputs[0].shape[1], {axis: length})
    return Source({info.name: source[None]}, rows, np.arange(most)[None] < rows)


def check_length(plan: PlanInfo, axis: str, length: int, unit: str) -> None:
    """Raises PromptError for a recording that the plan was not built for."""
    least, _, most = plan.profiles[0].sizes[axis]
    if not least <= length <= most:
        raise PromptError(
            f"The recording has {length} {unit}, and the engine takes {least} to {most}. "
            "Fix: headstart build --audio-seconds N, or a shorter piece."
        )


def filled(array: NDArray[Any], axis: int, size: int) -> NDArray[Any]:
    """`array` padded with zeros along one axis, up to `size`: rows that a mask hides."""
    ends = [(0, 0)] * array.ndim
    ends[axis] = (0, size - array.shape[axis])
    return np.pad(array, ends)

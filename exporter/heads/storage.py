"""Head graphs on disk: their own weights, and references to weights that lie in the target's data file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.exporter.graph import store_weights
from headstart.runtime.bundle import Bundle, WeightInfo


def reference(name: str, info: WeightInfo) -> ir.ExternalTensor:
    """A tensor that lies in another graph's data file, two folders up from a head's."""
    dtype = ir.DataType.from_numpy(np.dtype(info.dtype))
    length = int(np.prod(info.shape)) * np.dtype(info.dtype).itemsize
    return ir.ExternalTensor(f"../../{info.file}", info.offset, length, dtype, shape=ir.Shape(info.shape), name=name)


@dataclass(frozen=True)
class LmHeadRows:
    """Some rows of a target's LM head, as its bundle stores them.

    Attributes:
        values: [rows, H] float32, or int8 with `scales` [rows].
        rotation: the block of the rotation that the states they are multiplied with go through; 0 for none.
    """

    values: NDArray[Any]
    scales: NDArray[np.float32] | None
    rotation: int


def lm_head_rows(bundle: Path, weights: Mapping[str, WeightInfo], hidden: int, rows: NDArray[np.int64]) -> LmHeadRows:
    """The rows of those tokens, whichever way round the matrix is stored."""
    info, scale = weights["lm_head"], weights.get("lm_head.scale")
    matrix = _mapped(bundle, info)
    values = np.ascontiguousarray(matrix[rows] if info.shape[1] == hidden else matrix[:, rows].T)
    scales = None if scale is None else _mapped(bundle, scale)[rows].astype(np.float32)
    return LmHeadRows(values if scale is not None else values.astype(np.float32), scales, info.rotation)


def _mapped(bundle: Path, info: WeightInfo) -> NDArray[Any]:
    return np.memmap(bundle / info.file, info.dtype, "r", info.offset, info.shape)


def save_head(model: ir.Model, file: Path) -> None:
    """Write a head's graph and its own weights; references to other files stay references, which ir.save would copy in."""
    shared = [str(weight.name) for weight in model.graph.initializers.values() if _is_reference(weight)]
    store_weights(model, file, shared)
    model.producer_name = "headstart"
    ir.save(model, file)


def _is_reference(weight: ir.Value) -> bool:
    return isinstance(weight.const_value, ir.ExternalTensor) and str(weight.const_value.location).startswith("..")


def load_head(bundle: Bundle, name: str) -> ir.Model:
    """A head's graph, with the weights it shares with the target read in: they lie outside its folder, where loaders stop."""
    info = bundle.head(name)
    model = ir.load(bundle.path / info.graph.file)
    for shared, weight in info.shared.items():
        model.graph.initializers[shared].const_value = ir.tensor(_mapped(bundle.path, weight), name=shared)
    return model

"""Translation without decomposition gives what torch's own gives, and is left where a program needs decomposing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from headstart.exporter import translator

ROWS = torch.export.Dim("rows")


class Graph(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        return self.function(values)


def casts(values: Tensor) -> Tensor:
    """To another type, to its own, to another's, to a device; through assertions and a detached tensor."""
    halves = values.to(torch.float16).to(values.dtype).to("cpu")
    whole = (values * 3).long().to(torch.int32)
    return halves.detach() + whole.type_as(values) + values.to(values) * 0.5


def truths(values: Tensor) -> Tensor:
    low, high, other = values < 0.5, values > -0.5, values > 0
    return torch.where((low & high) | (other ^ low), values, -values)


def integers(values: Tensor) -> Tensor:
    whole = (values * 7).long()
    return ((whole & 5) | (whole ^ 3)).float()


def promotion(values: Tensor) -> Tensor:
    return values.half() * values + (values > 0) * 2


def written_in_place(values: Tensor) -> Tensor:
    result = torch.zeros_like(values)
    result[:, 0] += values[:, 0]
    result.add_(values[:, 1:2])
    return result


def written_to_a_copy(values: Tensor) -> Tensor:
    """The cast is what keeps the values as they are."""
    copy = values.to(values.dtype, copy=True)
    copy.add_(1)
    return copy * values


def returned(values: Tensor) -> Tensor:
    return values.to(values.dtype).detach()


def without_translation(values: Tensor) -> Tensor:
    return torch.nn.functional.huber_loss(values, values * 2, reduction="none") + torch.addr(values, values[:, 0], values[0])


def run(program: Any, values: Tensor) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(None, {session.get_inputs()[0].name: values.numpy()})[0]
    return result


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs that torch decomposed."""
    seen: list[Any] = []
    original = translator.decompose_all
    monkeypatch.setattr(translator, "decompose_all", lambda *args: seen.append(args) or original(*args))
    return seen


@pytest.mark.parametrize(
    ("function", "decomposes"),
    [
        (casts, 0),
        (truths, 0),
        (integers, 0),
        (promotion, 0),
        (written_in_place, 1),
        (written_to_a_copy, 1),
        (returned, 0),
        (without_translation, 1),
    ],
)
def test_a_graph_computes_what_its_module_does(
    function: Callable[[Tensor], Tensor], decomposes: int, decompositions: list[Any]
) -> None:
    values = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    program = translator.translated(Graph(function), (values[:3, :],), ({0: ROWS},))
    assert len(decompositions) == decomposes
    np.testing.assert_allclose(run(program, values), function(values).numpy(), rtol=1e-6)


@pytest.mark.parametrize("function", [casts, written_in_place])
def test_torch_is_left_as_it_was(function: Callable[[Tensor], Tensor]) -> None:
    def impossible(values: Tensor) -> Tensor:
        return values if values.sum() > 0 else -values

    before = (ONNXRegistry.from_torchlib, _fx_passes.decompose_with_registry)
    translator.translated(Graph(function), (torch.randn(3, 4),), ({0: ROWS},))
    with pytest.raises(torch.onnx.OnnxExporterError):
        translator.translated(Graph(impossible), (torch.randn(3, 4),), ({0: ROWS},))
    assert before == (ONNXRegistry.from_torchlib, _fx_passes.decompose_with_registry)

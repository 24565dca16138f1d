"""Loading says what would otherwise cost speed in silence."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from headstart.calibration.quantize import quantize
from headstart.exporter.build import build
from headstart.runtime.bundle import Bundle
from headstart.runtime.loading import load


def test_a_quantized_bundle_that_is_not_built_says_so_in_one_line(bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    """ONNX Runtime runs the canonical graph of a quantized bundle many times slower than the built one."""
    folder = tmp_path / "int8"
    quantize(bundle_of("llama").path, folder)
    with pytest.warns(RuntimeWarning, match=r"is quantized and not built for cpu.*Fix: headstart build .*int8 --device cpu\.$"):
        load(folder)
    build(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)


def test_a_float_bundle_needs_no_building(bundle_of: Callable[[str], Bundle]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(bundle_of("llama").path)

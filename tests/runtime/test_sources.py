"""Axes as manifests write them."""

import pytest

from headstart.runtime.engines.sources import axis_size, open_axis
from headstart.runtime.errors import BundleError


@pytest.mark.parametrize(
    ("axis", "size"), [(80, 80), ("source", 7), ("(((s21 - 127)//384)) - 1", 40), ("samples//160", 100), ("2*source + 1", 15)]
)
def test_sizes(axis: int | str, size: int) -> None:
    assert axis_size(axis, {"source": 7, "s21": 16_000, "samples": 16_000}) == size


@pytest.mark.parametrize("axis", ["frames", "max(source, 3)", "source.real", "source ** 9"])
def test_what_is_no_size(axis: str) -> None:
    with pytest.raises(BundleError, match="has no size that could be told"):
        axis_size(axis, {"source": 7})


def test_the_open_axis() -> None:
    assert open_axis(("batch", "s21", 80)) == "s21"
    assert open_axis(("batch", "source")) is None and open_axis(("batch", 80, 600)) is None

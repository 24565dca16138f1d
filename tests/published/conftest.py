"""Bundles of published checkpoints, made once per run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from published_bundles import Bundles, fetched, make_bundles


@pytest.fixture(scope="session")
def bundles_of(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], Bundles]:
    """name -> its bundles."""

    def of(name: str) -> Bundles:
        checkpoint = fetched(name)
        folder = made_once(f"published/{name}", lambda folder: make_bundles(checkpoint, folder))
        return Bundles(checkpoint, folder / "float32", folder / "int8")

    return of

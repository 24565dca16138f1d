"""An encoder's outputs are kept for the last source, and never for another."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.last_source import LastSource
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine


def test_equal_sources_are_encoded_once_while_the_first_lives() -> None:
    kept, calls = LastSource[int](), []

    def encode(source: Any) -> int:
        calls.append(source.copy())
        return len(calls)

    first = np.arange(5)
    assert [kept.encoded(source, encode) for source in (first, np.arange(5), first)] == [1, 1, 1]
    first[2] = 9  # the caller uses its array again
    assert kept.encoded(first, encode) == 2
    assert kept.encoded(np.arange(6), encode) == 3  # another length
    del first
    gc.collect()
    again = np.arange(6)
    assert kept.encoded(again, encode) == 4, "what nobody keeps is forgotten"
    assert kept.encoded(again, encode) == 4


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_an_engine_encodes_a_source_once(
    name: str, bundle_of: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runs = OnnxRuntimeEngine(bundle_of(name)), []
    original = engine._encode
    monkeypatch.setattr(engine, "_encode", lambda source: runs.append(1) or original(source))
    info = engine.bundle.manifest.graphs["encoder"].inputs[0]
    shape = [size if isinstance(size, int) else 64 for size in info.shape[1:]]
    rng = np.random.default_rng(0)
    one, other = ((rng.integers(3, 90, shape) if name == "t5" else rng.standard_normal(shape)).astype(info.dtype) for _ in "ab")
    alone, pair = engine.encode([one]), engine.encode([one, other])
    assert len(runs) == 2
    np.testing.assert_array_equal(pair.buffers[0][0], alone.buffers[0][0])
    assert not np.array_equal(pair.buffers[0][0], pair.buffers[0][1])

"""The encoder's outputs for the source that was read last.

Several samples of one answer, a window that is decoded again, and every check of `verify` read one source many times; Whisper's
encoder takes longer than all passes of a short answer.
"""

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class LastSource(Generic[T]):
    """Keeps one result, for as long as somebody keeps the source that it was computed from."""

    def __init__(self) -> None:
        self._owner: weakref.ref[NDArray[Any]] | None = None
        self._kept: tuple[NDArray[Any], T] | None = None

    def encoded(self, source: NDArray[Any], encode: Callable[[NDArray[Any]], T]) -> T:
        """`encode(source)`, or what it gave for an equal source. Compared by value: a caller may use an array again."""
        if self._kept is not None and np.array_equal(self._kept[0], source):
            return self._kept[1]
        result = encode(source)
        self._kept = source.copy(), result
        self._owner = weakref.ref(source, self._forget)
        return result

    def _forget(self, owner: weakref.ref[NDArray[Any]]) -> None:
        if owner is self._owner:
            self._kept = None

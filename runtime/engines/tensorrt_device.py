"""What the TensorRT engine asks of a device: memory, copies in order, plans that run. `cuda` and `plans` have the real ones.

Addresses are whole numbers. Everything happens in the order in which it was asked for; only `download` waits.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray


class Device(Protocol):
    """Memory on the device; see `cuda.Cuda`."""

    def allocate(self, nbytes: int) -> int:
        """The address of so many bytes, all zero."""
        ...

    def free(self, address: int) -> None: ...

    def upload(self, address: int, data: NDArray[Any]) -> None: ...

    def download(self, data: NDArray[Any], address: int) -> None:
        """Fill `data`, when everything asked for before is done."""
        ...

    def copy(self, target: int, source: int, pitch: int, width: int, height: int) -> None:
        """`height` pieces of `width` bytes, each `pitch` bytes behind the last, from `source` to `target` on the device."""
        ...


class Plan(Protocol):
    """A built graph."""

    def run(self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        """Start one pass. `shapes` are the inputs'; `addresses` where inputs and outputs lie."""
        ...

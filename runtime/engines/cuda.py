"""Device memory and copies through cuda-python, on one stream.

NOT YET RUN: written against NVIDIA's documentation on machines without a GPU. What calls it (`tensorrt`) is tested with a
stand-in for this class.
"""

from typing import Any

from numpy.typing import NDArray

from headstart.runtime.errors import EngineError, missing_extra


class Cuda:
    """The GPU at hand. Raises MissingExtraError without cuda-python, EngineError without a GPU."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ModuleNotFoundError as error:
            raise missing_extra(error, "Decoding on a GPU") from error
        self._runtime: Any = runtime
        code, count = runtime.cudaGetDeviceCount()
        if int(code) or not count:
            raise EngineError(f"No GPU was found ({code.name}). Fix: run this on the device, or decode with --device cpu.")
        self.stream = int(self._call("cudaStreamCreate"))

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._runtime, name)(*arguments)
        if int(code):
            raise EngineError(f"{name} failed: {code.name}. Fix: less cache (headstart build --cache), if memory ran out.")
        return values[0] if values else None

    def allocate(self, nbytes: int) -> int:
        """The address of that many bytes, set to zero: a cache that holds no numbers at all would spoil what is masked."""
        address = int(self._call("cudaMalloc", nbytes))
        self._call("cudaMemset", address, 0, nbytes)
        return address

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def upload(self, address: int, data: NDArray[Any]) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, data.ctypes.data, data.nbytes, kind, self.stream)

    def download(self, data: NDArray[Any], address: int) -> None:
        """Waits until `data` is there."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", data.ctypes.data, address, data.nbytes, kind, self.stream)
        self._call("cudaStreamSynchronize", self.stream)

    def move_slot(self, address: int, plane: int, width: int, planes: int, source: int, target: int) -> None:
        """Copy `width` bytes from slot `source` to slot `target` of each of `planes` planes of `plane` bytes."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        begin, end = address + source * width, address + target * width
        self._call("cudaMemcpy2DAsync", end, plane, begin, plane, width, planes, kind, self.stream)

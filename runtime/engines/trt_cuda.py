"""Device memory and copies through cuda-python, on one stream.

NOT YET RUN: written against NVIDIA's documentation on machines without a GPU. What calls it (`tensorrt`) is tested with a
stand-in for this class.
"""

import weakref
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from headstart.runtime.errors import EngineError, missing_extra


def _release(runtime: Any, held: set[int]) -> None:
    """Free an engine's memory with the engine. Errors are ignored: CUDA may be shutting down."""
    for address in held:
        runtime.cudaFree(address)


class Cuda:
    """The GPU at hand; its memory is given back when it is gone.

    Raises MissingExtraError without cuda-python, EngineError without a GPU.
    """

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
        self._held: set[int] = set()
        weakref.finalize(self, _release, runtime, self._held)

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._runtime, name)(*arguments)
        if int(code):
            raise EngineError(f"{name} failed: {code.name}. Fix: less cache (headstart build --cache), if memory ran out.")
        return values[0] if values else None

    def allocate(self, nbytes: int) -> int:
        """The address of that many bytes, set to zero: a cache that holds no numbers at all would spoil what is masked."""
        address = int(self._call("cudaMalloc", nbytes))
        self._held.add(address)
        self._call("cudaMemsetAsync", address, 0, nbytes, self.stream)
        return address

    def free(self, address: int) -> None:
        self._held.discard(address)
        self._call("cudaFree", address)

    def upload(self, address: int, data: NDArray[Any]) -> None:
        """`data` may change at once: from memory that is not pinned CUDA has taken it over when the call returns."""
        assert data.flags.c_contiguous
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, data.ctypes.data, data.nbytes, kind, self.stream)

    def download(self, data: NDArray[Any], address: int) -> None:
        """Waits until `data` is there."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", data.ctypes.data, address, data.nbytes, kind, self.stream)
        self._call("cudaStreamSynchronize", self.stream)

    def copy(self, target: int, source: int, pitch: int, width: int, height: int) -> None:
        """`height` pieces of `width` bytes, each `pitch` bytes after the last."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", target, pitch, source, pitch, width, height, kind, self.stream)

    def capture(self, start: Callable[[], bool]) -> int | None:
        """A CUDA graph of what `start` starts on the stream; None where it could not be recorded. Nothing has run then."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        started = start()
        code, graph = self._runtime.cudaStreamEndCapture(self.stream)  # always: it is what ends a failed capture, too
        if not started or int(code):
            self._runtime.cudaGetLastError()  # forget it: no later call is to report it as its own
            return None
        code, executable = self._runtime.cudaGraphInstantiate(graph, 0)
        self._runtime.cudaGraphDestroy(graph)
        return None if int(code) else int(executable)

    def launch(self, graph: int) -> None:
        """Start what `capture` recorded."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def compute_capability(self) -> tuple[int, int]:
        """Of the GPU: (8, 9) for sm89."""
        kinds = self._runtime.cudaDeviceAttr
        wanted = kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor
        major, minor = (int(self._call("cudaDeviceGetAttribute", kind, 0)) for kind in wanted)
        return major, minor

    def memory_used(self) -> int:
        """Bytes of the device in use, by all processes."""
        code, free, total = self._runtime.cudaMemGetInfo()
        if int(code):
            raise EngineError(f"cudaMemGetInfo failed: {code.name}.")
        return int(total) - int(free)

"""Plans on a GPU, without one: which calls go to TensorRT and CUDA, in which order, and that the real modules have them."""

import types
from pathlib import Path
from typing import Any

import pytest

from headstart.runtime.engines.info import EngineInfo, PlanInfo, Profile
from headstart.runtime.engines.trt_cuda import Cuda
from headstart.runtime.engines.trt_plans import LoadedPlan, PlanLoader, RuntimeCache, open_library
from headstart.runtime.errors import EngineError

SHAPES, PLACES = {"hidden": (1, 1, 8)}, {"hidden": 256, "topk_ids": 512}


class Calls(list[str]):
    """What was called, in order."""

    def take(self) -> list[str]:
        """What was called since."""
        found = self.copy()
        self.clear()
        return found


class FakeCuda:
    stream = 7

    def __init__(self, calls: Calls, capturable: bool = True) -> None:
        self.calls, self.capturable = calls, capturable

    def allocate(self, nbytes: int) -> int:
        self.calls.append(f"allocate {nbytes}")
        return 4096

    def capture(self, start: Any) -> int | None:
        self.calls.append("capture")
        return 99 if start() and self.capturable else None

    def launch(self, graph: int) -> None:
        self.calls.append(f"launch {graph}")


class FakeContext:
    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> bool:
            self.calls.append(" ".join(map(str, (name, *arguments))))
            return True

        return call


class FakeEngine:
    num_io_tensors, device_memory_size_v2 = 2, 1000

    def __init__(self, calls: Calls) -> None:
        self.calls, self.configs = calls, list[Any]()

    def get_tensor_name(self, index: int) -> str:
        return list(PLACES)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name="HALF" if name == "hidden" else "INT64")

    def create_runtime_config(self) -> Any:
        config = types.SimpleNamespace(
            cuda_graph_strategy="DISABLED",
            set_execution_context_allocation_strategy=lambda strategy: self.calls.append(f"strategy {strategy}"),
            create_runtime_cache=lambda: FakeKernels(self.calls),
            set_runtime_cache=lambda cache: self.calls.append("set_runtime_cache"),
        )
        self.configs.append(config)
        return config

    def create_execution_context(self, _: Any) -> FakeContext:
        self.calls.append("create_execution_context")
        return FakeContext(self.calls)


class FakeKernels:
    def __init__(self, calls: Calls) -> None:
        self.calls, self.content = calls, b"new"

    def deserialize(self, content: bytes) -> bool:
        self.calls.append(f"deserialize {content.decode()}")
        return False

    def serialize(self) -> bytes:
        return self.content


def library(calls: Calls, rtx: bool, fits: bool = True) -> Any:
    """A stand-in for the module."""

    def refit(file: str) -> bool:
        calls.append(f"refit_from_file {Path(file).name}")
        return fits

    refitter = types.SimpleNamespace(refit_cuda_engine=lambda: calls.append("refit_cuda_engine") or True)
    found = types.SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        Runtime=lambda log: types.SimpleNamespace(deserialize_cuda_engine=lambda plan: FakeEngine(calls) if plan else None),
        Refitter=lambda engine, log: refitter,
        OnnxParserRefitter=lambda refitter, log: types.SimpleNamespace(refit_from_file=refit),
        ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="USER_MANAGED"),
    )
    if rtx:
        found.CudaGraphStrategy = types.SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE")
        found.IRuntimeCache = FakeKernels
    return found


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    (tmp_path / "medusa.plan").write_bytes(b"plan")
    return tmp_path / "medusa.plan"


RUN = "execute_async_v3 7"
BOUND = ["set_input_shape hidden (1, 1, 8)", "set_tensor_address hidden 256", "set_tensor_address topk_ids 512"]
OPENED = ["create_execution_context", "set_optimization_profile_async 0 7", "set_device_memory 4096 1000"]


def test_classic_captures_what_ran_once_and_then_replays(plan_file: Path) -> None:
    calls = Calls()
    plan = LoadedPlan(library(calls, rtx=False), plan_file, FakeCuda(calls), replayed=[0])  # type: ignore[arg-type]
    assert calls.take() == ["allocate 1000"]
    plan.run(0, SHAPES, PLACES)
    assert calls.take() == [*OPENED, *BOUND, RUN]
    plan.run(0, SHAPES, PLACES)
    assert calls.take() == ["capture", RUN, "launch 99"]
    plan.run(0, SHAPES, PLACES)
    assert calls.take() == ["launch 99"]
    plan.run(0, SHAPES, PLACES | {"topk_ids": 768})
    assert calls.take() == [*BOUND[:2], "set_tensor_address topk_ids 768", RUN], "another place is another graph"


def test_what_is_not_replayed_is_not_captured(plan_file: Path) -> None:
    """Prompts: bound anew only where something changed."""
    calls = Calls()
    plan = LoadedPlan(library(calls, rtx=False), plan_file, FakeCuda(calls))  # type: ignore[arg-type]
    for _ in range(3):
        plan.run(0, SHAPES, PLACES)
    assert calls.take()[1:] == [*OPENED, *BOUND, RUN, RUN, RUN]


def test_a_failed_capture_is_said_once(plan_file: Path) -> None:
    calls = Calls()
    plan = LoadedPlan(library(calls, rtx=False), plan_file, FakeCuda(calls, capturable=False), [0, 1])  # type: ignore[arg-type]
    plan.run(0, SHAPES, PLACES)
    with pytest.warns(UserWarning, match="could not be captured as a CUDA graph; decoding goes on without") as said:
        for _ in range(3):
            plan.run(0, SHAPES, PLACES)
    assert len(said) == 1 and calls.count("capture") == 1 and calls[-2:] == [RUN, RUN]


def test_rtx_captures_itself_and_keeps_its_kernels(plan_file: Path) -> None:
    calls = Calls()
    file = plan_file.with_name("runtime.cache")
    file.write_bytes(b"old")
    kernels = RuntimeCache(file)
    plan = LoadedPlan(library(calls, rtx=True), plan_file, FakeCuda(calls), [1], kernels)  # type: ignore[arg-type]
    for profile in (0, 1):
        plan.run(profile, SHAPES, PLACES)
        plan.run(profile, SHAPES, PLACES)
    assert "capture" not in calls and calls.count("deserialize old") == 1 and calls.count("set_runtime_cache") == 2
    assert [config.cuda_graph_strategy for config in plan.engine.configs] == ["DISABLED", "WHOLE_GRAPH_CAPTURE"]
    assert file.read_bytes() == b"old"
    del plan, kernels  # closing writes what there is now: the library had refused what another version wrote
    assert file.read_bytes() == b"new" and sorted(p.name for p in file.parent.iterdir()) == ["medusa.plan", "runtime.cache"]


def test_kernels_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    kernels = RuntimeCache(tmp_path / "gone" / "runtime.cache")
    kernels.attach(FakeEngine(Calls()).create_runtime_config())
    with pytest.warns(UserWarning, match="cannot be written .* the next start finishes its kernels again"):
        del kernels


def test_a_stripped_plan_gets_its_weights(plan_file: Path) -> None:
    calls, weights = Calls(), plan_file.with_suffix(".onnx")
    LoadedPlan(library(calls, rtx=True), plan_file, FakeCuda(calls), weights=weights)  # type: ignore[arg-type]
    assert calls.take() == ["refit_from_file medusa.onnx", "refit_cuda_engine", "allocate 1000"]
    with pytest.raises(EngineError, match=r"medusa.onnx does not hold the plan's weights\. Fix: headstart build --force"):
        LoadedPlan(library(calls, rtx=True, fits=False), plan_file, FakeCuda(calls), weights=weights)  # type: ignore[arg-type]


def test_a_plan_of_another_gpu(tmp_path: Path) -> None:
    (tmp_path / "empty.plan").touch()
    with pytest.raises(EngineError, match="it was built for another GPU"):
        LoadedPlan(library(Calls(), rtx=True), tmp_path / "empty.plan", FakeCuda(Calls()))  # type: ignore[arg-type]


def test_prompts_and_sources_are_not_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr("headstart.runtime.engines.trt_plans.open_library", lambda info: library(calls, rtx=True))
    prompt, verify = (Profile(name, {"chosen": (n, n, n)}) for name, n in (("prefill", 1), ("verify-4", 4)))
    plans = {"decoder": (prompt, verify), "encoder": (Profile("all", {}),), "heads/medusa": (Profile("all", {}),)}
    info = EngineInfo(
        *(3, "trt-rtx:sm89", "", {}, {}, {name: f"{name}.plan" for name in plans}, {"strip_weights": "True"}),
        plans={name: PlanInfo(0, 0.0, profiles, {}) for name, profiles in plans.items()},
    )
    loader = PlanLoader(info, tmp_path, lambda: FakeCuda(calls))
    (tmp_path / "heads").mkdir()
    found = {}
    for name in plans:
        (tmp_path / f"{name}.plan").write_bytes(b"plan")
        found[name] = loader.open(name)._replayed
    assert found == {"decoder": {1}, "encoder": set(), "heads/medusa": {0}}
    assert "refit_from_file medusa.onnx" in calls


def test_the_real_library_has_what_is_called() -> None:
    """Names and, where the binding tells them, parameters. It can be asked without a GPU."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")
    used = {
        "Runtime": ("deserialize_cuda_engine",),
        "ICudaEngine": (
            *("get_tensor_name", "get_tensor_dtype", "num_io_tensors", "device_memory_size_v2", "create_runtime_config"),
            *("create_execution_context", "get_aliased_input_tensor", "get_tensor_profile_shape"),
        ),
        "IExecutionContext": (
            *("set_optimization_profile_async", "set_device_memory", "set_input_shape", "set_tensor_address"),
            "execute_async_v3",
        ),
        "IRuntimeConfig": (
            *("set_execution_context_allocation_strategy", "cuda_graph_strategy", "create_runtime_cache", "set_runtime_cache"),
        ),
        "IRuntimeCache": ("deserialize", "serialize"),
        "Refitter": ("refit_cuda_engine",),
        "OnnxParserRefitter": ("refit_from_file",),
        "CudaGraphStrategy": ("WHOLE_GRAPH_CAPTURE",),
        "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
        "BuilderFlag": ("STRIP_PLAN", "REFIT", "REFIT_IDENTICAL", "VERSION_COMPATIBLE"),
        "Logger": ("ERROR",),
    }
    assert [f"{kind}.{name}" for kind, names in used.items() for name in names if not hasattr(getattr(trt, kind), name)] == []
    parameters = {
        ("IExecutionContext", "set_device_memory"): ("memory", "size"),
        ("IExecutionContext", "set_optimization_profile_async"): ("profile_index", "stream_handle"),
        ("IExecutionContext", "set_input_shape"): ("name", "shape"),
        ("IExecutionContext", "set_tensor_address"): ("name", "memory"),
        ("IExecutionContext", "execute_async_v3"): ("stream_handle",),
        ("IRuntimeConfig", "set_runtime_cache"): ("cache",),
        ("IRuntimeCache", "deserialize"): ("blob",),
        ("OnnxParserRefitter", "refit_from_file"): ("model",),
    }
    for (kind, name), wanted in parameters.items():
        signature = getattr(getattr(trt, kind), name).__doc__
        assert all(f"{parameter}:" in signature for parameter in wanted), signature
    assert "runtime_config" in trt.ICudaEngine.create_execution_context.__doc__


class FakeRuntime:
    """cuda.bindings.runtime without a GPU: notes each call, and answers as the real functions do, with a tuple."""

    def __init__(self, real: Any) -> None:
        self.real, self.calls = real, Calls()
        self.answers: dict[str, tuple[Any, ...]] = {
            "cudaGetDeviceCount": (1,),
            "cudaStreamCreate": (7,),
            "cudaMalloc": (4096,),
            "cudaStreamEndCapture": (5,),
            "cudaGraphInstantiate": (99,),
            "cudaMemGetInfo": (30, 100),
            "cudaDeviceGetAttribute": (8,),
        }

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.real, name)  # only what is there
        if not callable(real) or isinstance(real, type):
            return real

        def call(*arguments: Any) -> tuple[Any, ...]:
            stated = (real.__doc__ or "").split("\n")[0]
            wanted = stated[stated.index("(") + 1 : stated.rindex(")")]
            assert len(arguments) == (wanted.count(",") + 1 if wanted else 0), stated
            self.calls.append(name)
            return (self.real.cudaError_t.cudaSuccess, *self.answers.get(name, ()))

        return call


def test_cuda_s_calls_are_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs the extra trt-rtx")
    fake = FakeRuntime(runtime)
    monkeypatch.setattr("cuda.bindings.runtime", fake)
    cuda = Cuda()
    address = cuda.allocate(64)
    cuda.upload(address, np.zeros(8))
    cuda.download(np.zeros(8), address)
    cuda.copy(address, address + 32, 16, 8, 2)
    assert cuda.capture(lambda: True) == 99
    cuda.launch(99)
    cuda.free(address)
    assert cuda.memory_used() == 70 and cuda.compute_capability() == (8, 8)
    assert fake.calls[2:] == [
        *("cudaMalloc", "cudaMemsetAsync", "cudaMemcpyAsync", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaMemcpy2DAsync"),
        *("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy", "cudaGraphLaunch"),
        *("cudaFree", "cudaMemGetInfo", "cudaDeviceGetAttribute", "cudaDeviceGetAttribute"),
    ]


def test_a_capture_that_fails_leaves_the_stream_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs the extra trt-rtx")
    fake = FakeRuntime(runtime)
    monkeypatch.setattr("cuda.bindings.runtime", fake)
    cuda = Cuda()
    fake.calls.clear()
    assert cuda.capture(lambda: False) is None
    assert fake.calls == ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGetLastError"]


def test_memory_goes_with_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRuntime(pytest.importorskip("cuda.bindings.runtime", reason="needs the extra trt-rtx"))
    monkeypatch.setattr("cuda.bindings.runtime", fake)
    cuda = Cuda()
    fake.answers["cudaMalloc"] = (8192,)
    address = cuda.allocate(64)
    fake.answers["cudaMalloc"] = (4096,)
    cuda.allocate(64)
    cuda.free(address)
    fake.calls.clear()
    del cuda
    assert fake.calls == ["cudaFree"]


def test_the_version_is_the_one_it_was_built_with(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", types.SimpleNamespace(__version__="2.0"))
    info = EngineInfo(1, "trt-rtx:sm89", "", {"tensorrt_rtx": "1.7.1.116"}, {}, {}, {})
    with pytest.raises(EngineError, match=r"built with tensorrt_rtx 1\.7\.1\.116, and here is 2\.0"):
        open_library(info)

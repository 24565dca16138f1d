"""The engine for ONNX Runtime's CUDA provider, all but the provider: device memory, bindings and commits, on the CPU."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from random_head import add_random_head

from headstart.exporter.build import build
from headstart.runtime.beam import BeamOptions, beam_search
from headstart.runtime.bundle import Bundle
from headstart.runtime.contract import HIDDEN, LOGITS
from headstart.runtime.drafters.medusa import MedusaDrafter
from headstart.runtime.drafters.ngram import NGramDrafter
from headstart.runtime.engines.device import DeviceGraph, DeviceSlots, Tensor
from headstart.runtime.engines.info import ENGINE_FILE, built_engine, engine_folder
from headstart.runtime.engines.ort_device import OrtMemory, SessionExecutor
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.engines.ort_session import CUDA, Provider, cuda_provider, open_session
from headstart.runtime.errors import EngineError, MissingExtraError
from headstart.runtime.host_memory import SlotBuffers, SlotMemory
from headstart.runtime.loading import load
from headstart.runtime.model import Model
from headstart.runtime.prefill import last_logits, prefill, run_decoder
from headstart.runtime.tokenizer import Tokenizer
from headstart.runtime.tree import ROOT, DraftTree

BundleOf = Callable[[str], Bundle]
ON_CPU = Provider(device="cuda", location="cpu")
NOISE = 0.02  # of the logits' range, what half precision costs these models: their weights are four times as large as usual


def built_for_cuda(source: Bundle, folder: Path) -> Bundle:
    shutil.copytree(source.path, folder)
    build(folder, "cuda")
    return Bundle.load(folder)


def opened(bundle: Bundle, provider: Provider = ON_CPU) -> OnnxRuntimeEngine:
    info = built_engine(bundle, "cuda")
    assert info is not None
    return OnnxRuntimeEngine(bundle, built=(info, engine_folder(bundle, "cuda")), provider=provider)


def slots_of(state: Any) -> dict[str, Tensor]:
    (part,) = state.parts
    assert isinstance(part, DeviceSlots)
    return part.tensors


def executor_of(engine: OnnxRuntimeEngine) -> SessionExecutor:
    graph = engine.graph("decoder")
    assert isinstance(graph, DeviceGraph) and isinstance(graph.executor, SessionExecutor)
    return graph.executor


@pytest.fixture(scope="module")
def bundle(bundle_of: BundleOf, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A llama with a random Medusa head."""
    folder = tmp_path_factory.mktemp("cuda-engine")
    shutil.copytree(bundle_of("llama").path, folder / "plain")
    add_random_head(folder / "plain", folder / "head")
    return built_for_cuda(Bundle.load(folder / "plain"), folder / "bundle")


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> OnnxRuntimeEngine:
    return opened(bundle)


@pytest.mark.parametrize("rows", [1, 2, 3, 9, 64])
def test_logits_and_states_are_the_canonical_graph_s(bundle: Bundle, engine: OnnxRuntimeEngine, rows: int) -> None:
    found = []
    for one in (engine, OnnxRuntimeEngine(bundle)):
        cache = one.graph("decoder").new_state(1, 128)
        prefill(one, cache, list(range(5, 45)))
        ids = np.arange(rows)[None] + 50
        output = run_decoder(one, cache, ids, ids - 10, np.tri(rows, dtype=np.bool_)[None], np.arange(rows)[None])
        found.append((output[LOGITS].copy(), output[HIDDEN].copy()))
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == np.float32
        assert np.abs(ours - theirs).max() < NOISE * np.ptp(theirs)


@pytest.mark.parametrize("path", [[0], [1, 4], [0, 2], [0, 3, 5], [1]])
def test_decoding_goes_on_after_a_commit_on_the_device(engine: OnnxRuntimeEngine, path: list[int]) -> None:
    generator = np.random.default_rng(0)
    prompt = generator.integers(3, 300, 15).tolist()
    tree = DraftTree(generator.integers(3, 300, 7), np.array([ROOT, ROOT, 0, 0, 1, 3, 5]), np.zeros(7, np.float32))
    cache = engine.graph("decoder").new_state(1, 64)
    prefill(engine, cache, prompt[:-1])
    ids = np.array([[prompt[-1], *tree.token_ids]])
    positions = len(prompt) - 1 + tree.depths()[None]
    run_decoder(engine, cache, ids, positions, tree.ancestor_mask()[None], np.arange(8)[None])
    cache.commit(0, [0, *(node + 1 for node in path)])
    after = last_logits(prefill(engine, cache, [42]))
    text = [*prompt, *(int(tree.token_ids[node]) for node in path), 42]
    plain = last_logits(prefill(engine, engine.graph("decoder").new_state(1, 64), text))
    assert np.abs(after - plain).max() < 2e-3 * np.ptp(plain)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_commits_and_gathers_move_what_numpy_would(engine: OnnxRuntimeEngine, row: int) -> None:
    """Bit by bit, in a batch; other sequences are left alone."""
    ours, theirs = engine.graph("decoder").new_state(3, 20), OnnxRuntimeEngine(engine.bundle).graph("decoder").new_state(3, 20)
    generator = np.random.default_rng(row)
    contents = [generator.standard_normal(tensor.shape).astype(np.float16) for tensor in slots_of(ours).values()]
    for tensor, array in zip(slots_of(ours).values(), contents, strict=True):
        engine._memory.write(tensor, array)
    copies = {name: array.copy() for name, array in zip(slots_of(ours), contents, strict=True)}
    theirs.parts = (SlotMemory(SlotBuffers(copies)),)
    for cache in (ours, theirs):
        cache.lengths[:] = [3, 7, 5]
        cache.commit(row, [0, 2, 3, 6])
        cache.row(row).commit(0, [1, 4])
        cache.gather([2, row, 0])
    assert ours.lengths.tolist() == theirs.lengths.tolist()
    for name, tensor in slots_of(ours).items():
        for index, length in enumerate(ours.lengths):
            found, wanted = engine._memory.read(tensor)[index], theirs.parts[0].arrays[name][index]
            assert (found[:, :length] == wanted[:, :length]).all()


@pytest.mark.parametrize("drafter", ["ngram", "medusa"])
def test_drafts_change_no_token(bundle: Bundle, engine: OnnxRuntimeEngine, drafter: str) -> None:
    """Speculative against plain decoding on this engine, one by one and as a batch, and both against the CPU engine."""
    info = bundle.head("medusa")
    drafters = {"ngram": NGramDrafter(), "medusa": MedusaDrafter("medusa", engine.graph("heads/medusa"), info.heads)}
    model = Model(bundle, engine, Tokenizer.load(bundle.path / "tokenizer"), drafters)  # type: ignore[arg-type]
    prompts, options = ["abc abc abc abc ", "hello"], {"max_new_tokens": 48, "ignore_end": True}
    cpu = load(bundle.path).generate(prompts, drafter="none", **options)
    for prompt, wanted in zip(prompts, cpu, strict=True):
        plain = model.generate(prompt, drafter="none", **options)
        drafted = model.generate(prompt, drafter=drafter, **options)
        assert drafted.token_ids == plain.token_ids == wanted.token_ids and drafted.stats.drafted_tokens > 0
    assert [result.token_ids for result in model.generate(prompts, drafter=drafter, **options)] == [r.token_ids for r in cpu]


def test_beams_are_the_cpu_engine_s(bundle: Bundle, engine: OnnxRuntimeEngine) -> None:
    options = BeamOptions(num_beams=3, max_new_tokens=12)
    found = [beam_search(one, [5, 6, 7, 8], options) for one in (engine, OnnxRuntimeEngine(bundle))]
    assert [beam.token_ids for beam in found[0]] == [beam.token_ids for beam in found[1]]


@pytest.mark.parametrize("name", ["t5", "speech"])
def test_encoder_decoders(name: str, bundle_of: BundleOf, speech_bundle: Bundle, tmp_path: Path) -> None:
    source = speech_bundle if name == "speech" else bundle_of(name)
    bundle = built_for_cuda(source, tmp_path / "bundle")
    cpu = load(bundle.path)
    model = Model(bundle, opened(bundle), cpu.tokenizer, {"ngram": NGramDrafter()})
    shape = bundle.manifest.graphs["encoder"].inputs[0].shape[1:]
    generator = np.random.default_rng(1)
    prompts: list[Any] = ["abc def", "a longer source than that"]
    if name == "speech":
        prompts = [generator.standard_normal(shape).astype(np.float32) for _ in range(2)]
    options = {"max_new_tokens": 24, "ignore_end": True}
    wanted = [cpu.generate(prompt, drafter="none", **options).token_ids for prompt in prompts]
    assert [model.generate(prompt, drafter="ngram", **options).token_ids for prompt in prompts] == wanted
    assert [result.token_ids for result in model.generate(prompts, drafter="none", **options)] == wanted


def test_buffers_and_bindings_serve_the_next_cache(engine: OnnxRuntimeEngine) -> None:
    first = engine.graph("decoder").new_state(1, 64)
    prefill(engine, first, [5, 6, 7])
    memory, bound = slots_of(first), len(executor_of(engine)._bound)
    held = engine.graph("decoder").new_state(1, 64)
    assert slots_of(held) != memory, "memory that is in use is no other state's"
    del first
    second = engine.graph("decoder").new_state(1, 64)
    assert slots_of(second) == memory and second.lengths.tolist() == [0]
    prefill(engine, second, [8, 9, 10])
    assert len(executor_of(engine)._bound) == bound


def test_a_row_keeps_its_batch_s_buffers(engine: OnnxRuntimeEngine) -> None:
    whole = engine.graph("decoder").new_state(2, 64)
    row, memory = whole.row(1), slots_of(whole)
    del whole
    other = engine.graph("decoder").new_state(2, 64)
    assert row.batch == 1 and slots_of(other) != memory


class Uncapturable:
    """A session that cannot be captured, as when an operator waits for the device."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        if options.get_run_config_entry("gpu_graph_id") != "-1":
            raise RuntimeError("operation not permitted when stream is capturing")
        self._session.run_with_iobinding(binding, options)


def test_a_failed_capture_warns_and_goes_on(bundle: Bundle, engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = prefill(engine, engine.graph("decoder").new_state(1, 64), [5, 6, 7])[LOGITS].copy()
    capturing = Provider(device="cuda", options={"CPUExecutionProvider": {}, CUDA: {"enable_cuda_graph": "1"}}, location="cpu")
    monkeypatch.setattr(
        "headstart.runtime.engines.ort_engine.open_session",
        lambda file, threads, shared=None, provider=ON_CPU, **_: (
            Uncapturable(open_session(file, threads)) if provider.captures else open_session(file, threads)
        ),
    )
    other = opened(bundle, capturing)
    cache = other.graph("decoder").new_state(1, 64)
    with pytest.warns(
        RuntimeWarning, match="CUDA graphs cannot be used with .*, decoding goes on without: operation not permitted"
    ):
        found = prefill(other, cache, [5, 6, 7])[LOGITS]
    assert (found == wanted).all() and not executor_of(other).captures
    prefill(other, cache, [8])


def test_a_graph_that_cannot_be_captured_warns_and_goes_on(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As T5Gemma 2's: the session refuses to open, because a node it needs for sizes is on the CPU."""
    session = onnxruntime.InferenceSession

    def refusing(*arguments: Any, providers: list[tuple[str, dict[str, str]]], **named: Any) -> Any:
        if any(options.get("enable_cuda_graph") for _, options in providers):
            raise RuntimeError("This session cannot use the graph capture feature")
        return session(*arguments, providers=["CPUExecutionProvider"], **named)

    monkeypatch.setattr("onnxruntime.InferenceSession", refusing)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    capturing = Provider(device="cuda", options={"CPUExecutionProvider": {"enable_cuda_graph": "1"}}, location="cpu")
    monkeypatch.setattr(
        Provider, "captures", property(lambda self: "enable_cuda_graph" in self.options["CPUExecutionProvider"])
    )
    with pytest.warns(RuntimeWarning, match="decoding goes on without: This session cannot use the graph capture feature"):
        engine = opened(bundle, capturing)
    assert not executor_of(engine).captures
    prefill(engine, engine.graph("decoder").new_state(1, 64), [5, 6, 7])


def test_only_captured_passes_are_forgiven(engine: OnnxRuntimeEngine) -> None:
    """A pass that fails without having been captured is an error like any other."""

    class Broken(Uncapturable):
        def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
            raise RuntimeError("out of memory")

    info = engine.bundle.graphs["decoder"]
    session = executor_of(engine).session
    executor = SessionExecutor("decoder", info, lambda captured: Broken(session), "cpu", captures=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        executor.run(0, {}, {}, replay=False)
    assert executor.captures


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_crosses_whole_and_in_parts(dtype: str) -> None:
    """Rounded to nearest, ties to even; a part of a tensor is written without touching the rest."""
    memory, values = OrtMemory("cpu"), np.array([[1.0, 1.00390625], [1.01171875, -3.14159]], np.float32)
    tensor = memory.tensors({"x": ((2, 2), dtype)})["x"]
    memory.write(tensor, values)
    wanted = {"float16": [[1.0, 1.00390625], [1.01171875, -3.140625]], "bfloat16": [[1.0, 1.0], [1.015625, -3.140625]]}
    assert memory.read(tensor).astype(np.float32).tolist() == wanted[dtype]
    memory.write(tensor.rows(1, 1), np.array([[8.0, 9.0]]))
    assert memory.read(tensor).astype(np.float32).tolist() == [wanted[dtype][0], [8.0, 9.0]]


def test_what_cannot_run_says_why(bundle_of: BundleOf, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"is not built for cuda\. Fix: headstart build .* --device cuda"):
        load(bundle_of("llama").path, "cuda")
    with pytest.raises(EngineError, match=r"has no CUDAExecutionProvider; it has .*overwrite each other's.*headstart\[gpu\]"):
        load(bundle.path, "cuda")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)
    cpu_only = open_session(engine_folder(bundle, "cuda") / "commit.onnx", 1)
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *arguments, **named: cpu_only)  # it falls back without a word
    with pytest.raises(EngineError, match=r"could not start its CUDAExecutionProvider: there is no GPU here.*--device cpu"):
        load(bundle.path, "cuda")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'headstart\[gpu\]'"):
        load(bundle.path, "cuda")


def test_an_engine_of_another_version_or_model_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "bundle")
    file = tmp_path / "bundle" / "engines" / "cuda" / ENGINE_FILE
    text = file.read_text()
    for change, message in (
        ({"schema_version": 1}, r"schema version 1, this Headstart reads .*--device cuda --force"),
        ({"source": {"graphs/decoder.onnx": "0"}}, r"was built from another .* than the bundle now holds"),
    ):
        file.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(EngineError, match=message):
            load(tmp_path / "bundle", "cuda")


def test_the_tensorrt_provider_is_asked_first_and_keeps_its_engines(tmp_path: Path) -> None:
    provider = cuda_provider("cuda:tensorrt", tmp_path)
    assert list(provider.options) == ["TensorrtExecutionProvider", CUDA] and not provider.captures
    assert provider.options["TensorrtExecutionProvider"]["trt_engine_cache_path"] == str(tmp_path)
    assert "trt_fp16_enable" not in provider.options["TensorrtExecutionProvider"], "graphs say their types"
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="engines cannot be kept in"):
        cuda_provider("cuda:tensorrt", tmp_path / "file" / "folder")
    plain = cuda_provider("cuda", tmp_path)
    assert plain.captures and not plain.uncaptured().captures and plain.uncaptured().options == {CUDA: {"device_id": "0"}}


def test_nothing_comes_down_unless_it_is_asked_for(engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, ids = engine.graph("decoder").new_state(1, 64), np.array([[5, 6, 7]])
    output = run_decoder(engine, cache, ids, ids - 5, np.tri(3, dtype=np.bool_)[None], np.arange(3)[None])
    read: list[tuple[int, ...]] = []
    fetch = OrtMemory.read
    monkeypatch.setattr(OrtMemory, "read", lambda memory, tensor: read.append(tensor.shape) or fetch(memory, tensor))
    scores = output.scores(0)
    best = [scores.best(row) for row in range(3)]
    assert read == [(1, 4)], "one small copy for all rows, the padded one among them"
    assert best == [int(scores[row].argmax()) for row in range(3)] and len(read) == 2
    assert (output.rows(HIDDEN, 0, [-1])[0] == output[HIDDEN][0, 2]).all() and len(read) == 3


def test_no_room_on_the_device(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle memory is given up first; then there is an error."""
    engine = opened(bundle)
    graph = engine.graph("decoder")
    assert isinstance(graph, DeviceGraph)
    graph.new_state(1, 64)  # idle at once: nothing refers to it
    tensor, tried = OrtMemory._tensor, []

    def full(memory: OrtMemory, shape: tuple[int, ...], dtype: str) -> Tensor:
        tried.append(sum(map(len, graph._states._idle.values())))
        raise RuntimeError("Failed to allocate memory")

    monkeypatch.setattr(OrtMemory, "_tensor", full)
    with pytest.raises(EngineError, match=r"no room for states of 2 x 256 tokens: Failed to allocate.* a shorter text"):
        graph.new_state(2, 64)
    assert tried == [1, 0]
    monkeypatch.setattr(OrtMemory, "_tensor", tensor)
    assert graph.new_state(2, 64).slots == 256

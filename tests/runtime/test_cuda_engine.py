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
from headstart.runtime.drafters.medusa import MedusaDrafter
from headstart.runtime.drafters.ngram import NGramDrafter
from headstart.runtime.engines.device import DeviceCache, DeviceMemory, Tensor, _stored
from headstart.runtime.engines.info import ENGINE_FILE, built_engine, engine_folder
from headstart.runtime.engines.onnxruntime import OnnxRuntimeEngine
from headstart.runtime.engines.provider import CUDA, CaptureError, Provider, cuda_provider, open_session
from headstart.runtime.errors import EngineError, MissingExtraError
from headstart.runtime.model import Model, load
from headstart.runtime.prefill import prefill
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
        cache = one.new_cache(1, 128)
        prefill(one, cache, list(range(5, 45)))
        ids = np.arange(rows)[None] + 50
        output = one.forward(cache, ids, ids - 10, np.tri(rows, dtype=np.bool_)[None], np.arange(rows)[None])
        found.append((output.logits.copy(), output.hidden.copy()))
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == np.float32
        assert np.abs(ours - theirs).max() < NOISE * np.ptp(theirs)


@pytest.mark.parametrize("path", [[0], [1, 4], [0, 2], [0, 3, 5], [1]])
def test_decoding_goes_on_after_a_commit_on_the_device(engine: OnnxRuntimeEngine, path: list[int]) -> None:
    generator = np.random.default_rng(0)
    prompt = generator.integers(3, 300, 15).tolist()
    tree = DraftTree(generator.integers(3, 300, 7), np.array([ROOT, ROOT, 0, 0, 1, 3, 5]), np.zeros(7, np.float32))
    cache = engine.new_cache(1, 64)
    prefill(engine, cache, prompt[:-1])
    ids = np.array([[prompt[-1], *tree.token_ids]])
    positions = len(prompt) - 1 + tree.depths()[None]
    engine.forward(cache, ids, positions, tree.ancestor_mask()[None], np.arange(8)[None])
    cache.commit(0, [0, *(node + 1 for node in path)])
    after = prefill(engine, cache, [42]).logits[0, 0].copy()
    text = [*prompt, *(int(tree.token_ids[node]) for node in path), 42]
    plain = prefill(engine, engine.new_cache(1, 64), text).logits[0, 0]
    assert np.abs(after - plain).max() < 2e-3 * np.ptp(plain)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_commits_and_gathers_move_what_numpy_would(engine: OnnxRuntimeEngine, row: int) -> None:
    """Bit by bit, in a batch; other sequences are left alone."""
    memory = engine._memory
    assert isinstance(memory, DeviceMemory)
    ours, theirs = engine.new_cache(3, 20), OnnxRuntimeEngine(engine.bundle).new_cache(3, 20)
    assert isinstance(ours, DeviceCache)
    generator = np.random.default_rng(row)
    contents = [generator.standard_normal(tensor.shape).astype(np.float16) for tensor in ours.storage.tensors]
    for tensor, array in zip(ours.storage.tensors, contents, strict=True):
        tensor.write(array)
    theirs.buffers = [array.copy() for array in contents]
    for cache in (ours, theirs):
        cache.lengths[:] = [3, 7, 5]
        cache.commit(row, [0, 2, 3, 6])
        cache.row(row).commit(0, [1, 4])
        cache.gather([2, row, 0])
    assert ours.lengths.tolist() == theirs.lengths.tolist()
    for tensor, buffer in zip(ours.storage.tensors, theirs.buffers, strict=True):
        for index, length in enumerate(ours.lengths):
            assert (tensor.read()[index, :, :length] == buffer[index, :, :length]).all()


@pytest.mark.parametrize("drafter", ["ngram", "medusa"])
def test_drafts_change_no_token(bundle: Bundle, engine: OnnxRuntimeEngine, drafter: str) -> None:
    """Speculative against plain decoding on this engine, one by one and as a batch, and both against the CPU engine."""
    info = bundle.head("medusa")
    drafters = {"ngram": NGramDrafter(), "medusa": MedusaDrafter("medusa", engine.head(info), info.heads)}
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
    first = engine.new_cache(1, 64)
    prefill(engine, first, [5, 6, 7])
    storage, bound = first.storage, len(first.storage.bound)  # type: ignore[attr-defined]
    held = engine.new_cache(1, 64)
    assert held.storage is not storage, "a cache that is in use is nobody else's"  # type: ignore[attr-defined]
    del first
    second = engine.new_cache(1, 64)
    assert second.storage is storage and second.lengths.tolist() == [0]  # type: ignore[attr-defined]
    prefill(engine, second, [8, 9, 10])
    assert len(storage.bound) == bound


def test_a_row_keeps_its_batch_s_buffers(engine: OnnxRuntimeEngine) -> None:
    whole = engine.new_cache(2, 64)
    row, storage = whole.row(1), whole.storage  # type: ignore[attr-defined]
    del whole
    other = engine.new_cache(2, 64)
    assert row.batch == 1 and other.storage is not storage  # type: ignore[attr-defined]


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
    wanted = prefill(engine, engine.new_cache(1, 64), [5, 6, 7]).logits.copy()
    capturing = Provider(device="cuda", options={"CPUExecutionProvider": {}, CUDA: {"enable_cuda_graph": "1"}}, location="cpu")
    monkeypatch.setattr(
        "headstart.runtime.engines.onnxruntime.open_session",
        lambda file, threads, shared=None, provider=ON_CPU, as_written=False: (
            Uncapturable(open_session(file, threads)) if provider.captures else open_session(file, threads)
        ),
    )
    other = opened(bundle, capturing)
    cache = other.new_cache(1, 64)
    with pytest.warns(
        RuntimeWarning, match="CUDA graphs cannot be used with .*, decoding goes on without: operation not permitted"
    ):
        found = prefill(other, cache, [5, 6, 7]).logits
    assert (found == wanted).all() and not other._provider.captures
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
    assert not engine._provider.captures
    prefill(engine, engine.new_cache(1, 64), [5, 6, 7])


def test_only_captured_passes_are_forgiven(engine: OnnxRuntimeEngine) -> None:
    binding = engine._memory.binding(Uncapturable(engine._session(1)), engine.new_cache(1, 64), 4, 4)
    binding.run()  # an id of -1: neither captured nor replayed
    binding._captured, binding._options = True, onnxruntime.RunOptions()  # type: ignore[union-attr]
    binding._options.add_run_config_entry("gpu_graph_id", "7")  # type: ignore[union-attr]
    with pytest.raises(CaptureError):
        binding.run()


def test_bfloat16_crosses_as_whole_numbers() -> None:
    bits = np.array([[0x3F80, 0x4049], [0xC000, 0]], np.uint16)
    value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
    assert _stored(value).tolist() == bits.tolist()
    tensor = Tensor((2, 2), "bfloat16", "cpu")
    tensor.write(bits)
    assert tensor.read().tolist() == bits.tolist() and tensor.place(1)[2:4] == (16, [1, 2])


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
    cache, ids = engine.new_cache(1, 64), np.array([[5, 6, 7]])
    output = engine.forward(cache, ids, ids - 5, np.tri(3, dtype=np.bool_)[None], np.arange(3)[None])
    read: list[tuple[int, ...]] = []
    fetch = Tensor.read
    monkeypatch.setattr(Tensor, "read", lambda tensor: read.append(tensor.shape) or fetch(tensor))
    scores = output.scores(0)
    best = [scores.best(row) for row in range(3)]
    assert read == [(1, 4)], "one small copy for all rows, the padded one among them"
    assert best == [int(scores[row].argmax()) for row in range(3)] and len(read) == 2
    assert (output.hidden_row(0, -1) == output.hidden[0, 2]).all() and len(read) == 3


def test_no_room_on_the_device(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle buffers go first; then it is said."""
    engine = opened(bundle)
    memory = engine._memory
    assert isinstance(memory, DeviceMemory)
    engine.new_cache(1, 64)  # idle at once: nobody keeps it
    tensors, tried = memory._tensors, []

    def full(batch: int, slots: int) -> list[Tensor]:
        tried.append(sum(map(len, memory._free.values())))
        raise RuntimeError("Failed to allocate memory")

    monkeypatch.setattr(memory, "_tensors", full)
    with pytest.raises(EngineError, match=r"no room for caches of 2 x 256 tokens: Failed to allocate.* a shorter text"):
        engine.new_cache(2, 64)
    assert tried == [1, 0]
    monkeypatch.setattr(memory, "_tensors", tensors)
    assert engine.new_cache(2, 64).slots == 256

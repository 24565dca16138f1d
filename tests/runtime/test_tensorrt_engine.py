"""The TensorRT engine's host side, over stand-ins: memory in one numpy array, and plans that ONNX Runtime computes.

What the plans compute is the very graph that is lowered for TensorRT, reading and writing at the addresses the engine gives.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from headstart.exporter.graph import save_graph
from headstart.exporter.heads.builder import load_head
from headstart.exporter.heads.install import import_head
from headstart.exporter.lowering.tensorrt import lower
from headstart.exporter.tensorrt.profiles import decoder_profiles
from headstart.runtime.bundle import Bundle
from headstart.runtime.drafters.medusa import MedusaDrafter
from headstart.runtime.drafters.ngram import NGramDrafter
from headstart.runtime.engine import MAX_ROWS
from headstart.runtime.engines.half import narrowed, widened
from headstart.runtime.engines.info import EngineInfo, PlanInfo
from headstart.runtime.engines.onnxruntime import OnnxRuntimeEngine
from headstart.runtime.engines.provider import open_session
from headstart.runtime.engines.tensorrt import TensorRtEngine, open_library
from headstart.runtime.errors import EngineError, PromptError
from headstart.runtime.model import Model
from headstart.runtime.prefill import prefill
from headstart.runtime.tokenizer import Tokenizer

BundleOf = Callable[[str], Bundle]
TOKENS = 192
SLOTS = TOKENS + MAX_ROWS
TYPES = {"tensor(int64)": np.int64, "tensor(bool)": np.bool_, "tensor(float16)": np.float16, "tensor(float)": np.float32}


class Memory:
    """A device whose memory is one numpy array."""

    def __init__(self) -> None:
        self.bytes, self._end = np.zeros(64 << 20, np.uint8), 256
        self.freed: list[int] = []

    def allocate(self, nbytes: int) -> int:
        address, self._end = self._end, -(-(self._end + nbytes) // 256) * 256
        return address

    def free(self, address: int) -> None:
        self.freed.append(address)

    def view(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[address : address + count].view(dtype).reshape(shape)

    def upload(self, address: int, data: NDArray[Any]) -> None:
        self.bytes[address : address + data.nbytes] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)

    def download(self, data: NDArray[Any], address: int) -> None:
        data[...] = self.view(address, data.shape, data.dtype)

    def move_slot(self, address: int, plane: int, width: int, planes: int, source: int, target: int) -> None:
        for index in range(planes):
            begin = address + index * plane
            self.bytes[begin + target * width :][:width] = self.bytes[begin + source * width :][:width].copy()


class StandInPlan:
    """A lowered graph in ONNX Runtime, between addresses."""

    def __init__(self, file: Path, memory: Memory, sizes: Mapping[str, int]) -> None:
        self.session, self.memory, self.sizes = open_session(file, 1), memory, sizes
        self.profiles: list[int] = []

    def run(self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        self.profiles.append(profile)
        feeds = {}
        for node in self.session.get_inputs():
            shape = shapes.get(node.name) or tuple(node.shape)
            feeds[node.name] = self.memory.view(addresses[node.name], shape, TYPES[node.type]).copy()
        for node, value in zip(self.session.get_outputs(), self.session.run(None, feeds), strict=True):
            self.memory.upload(addresses[node.name], value)


@pytest.fixture(scope="module")
def bundle(bundle_of: BundleOf, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A llama with a random Medusa head."""
    import shutil

    folder = tmp_path_factory.mktemp("tensorrt-engine")
    shutil.copytree(bundle_of("llama").path, folder / "bundle")
    (folder / "head").mkdir()
    torch.manual_seed(0)
    shapes = {"weight": (64, 64), "bias": (64,)}
    tensors = {f"{i}.0.linear.{part}": torch.randn(*shape) for i in range(2) for part, shape in shapes.items()}
    save_file(tensors, folder / "head" / "medusa_lm_head.safetensors")
    (folder / "head" / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    import_head(folder / "bundle", folder / "head", "medusa", 5)
    return Bundle.load(folder / "bundle")


def stand_in(bundle: Bundle, folder: Path, source_rows: int = 0) -> TensorRtEngine:
    """An engine of every graph of the bundle, lowered as for TensorRT, over stand-ins."""
    memory, sizes = Memory(), {"batch": 1, "slots": SLOTS, "source": source_rows}
    graphs = {name: ir.load(bundle.path / graph.file) for name, graph in bundle.manifest.graphs.items() if name != "frontend"}
    graphs |= {f"heads/{name}": load_head(bundle, name) for name in bundle.manifest.heads}
    for name, graph in graphs.items():
        save_graph(lower(graph, "float16", sizes).model, folder / f"{name}.onnx")
    info = EngineInfo(
        schema_version=1,
        device="trt-rtx:sm89",
        created="",
        builder={"tensorrt_rtx": "1"},
        source={},
        graphs={},
        settings={"precision": "float16"},
        plans={"decoder": PlanInfo(0, 0.0, decoder_profiles(32), {})},
        cache_slots=SLOTS,
        batch=1,
        source_rows=source_rows,
    )
    return TensorRtEngine(bundle, info, memory, lambda name: StandInPlan(folder / f"{name}.onnx", memory, sizes))


@pytest.fixture(scope="module")
def engine(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> TensorRtEngine:
    return stand_in(bundle, tmp_path_factory.mktemp("plans"))


def test_prompts_and_trees_equal_the_cpu_engine(bundle: Bundle, engine: TensorRtEngine) -> None:
    """A prompt in several passes, a tree in a padded one: logits and hidden states to half precision."""
    cpu = OnnxRuntimeEngine(bundle)
    prompt = np.random.default_rng(0).integers(3, 300, 75).tolist()
    for here, there in zip(_outputs(engine, prompt), _outputs(cpu, prompt), strict=True):
        assert here.shape == there.shape
        assert np.abs(here - there).max() < 0.02 * np.ptp(there)


def _outputs(engine: Any, prompt: list[int]) -> list[NDArray[np.float32]]:
    cache = engine.new_cache(1, 128)
    first = prefill(engine, cache, prompt)
    found = [first.logits.copy(), first.hidden[:, -1].copy()]
    mask = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 0, 1]], np.bool_)[None]
    ids, positions = np.array([[9, 8, 7, 6, 5]]), 75 + np.array([[0, 1, 1, 2, 2]])
    tree = engine.forward(cache, ids, positions, mask, np.arange(5)[None])
    found += [tree.logits.copy(), tree.hidden.copy()]
    cache.commit(0, [0, 2, 4])  # the root, its second child, that one's second child
    after = engine.forward(cache, np.array([[4]]), np.array([[78]]), np.ones((1, 1, 1), np.bool_), np.zeros((1, 1), np.int64))
    return [*found, after.logits.copy()]


@pytest.mark.parametrize(("name", "rows"), [("t5", 48), ("bart", 40), ("whisper", 60)])
def test_encoders_equal_the_cpu_engine(bundle_of: BundleOf, tmp_path: Path, name: str, rows: int) -> None:
    """A source padded to the engine's size gives what it gives alone: what is behind it is masked everywhere."""
    bundle = bundle_of(name)
    engine, cpu = stand_in(bundle, tmp_path, rows), OnnxRuntimeEngine(bundle)
    generator = np.random.default_rng(0)
    shape = bundle.manifest.graphs["encoder"].inputs[0].shape[1:]
    is_text = bundle.manifest.model.source == "text"
    source = generator.integers(3, 300, 17) if is_text else generator.standard_normal(tuple(map(int, shape))).astype(np.float32)
    found = []
    for one in (engine, cpu):
        cross = one.encode([source])
        cache = one.new_cache(1, 64, cross)
        ids = np.array([[1, 7, 9]])
        output = one.forward(cache, ids, np.arange(3)[None], np.tri(3, dtype=np.bool_)[None], np.arange(3)[None])
        found.append((cross.hidden[:, : 17 if is_text else None].astype(np.float32), output.logits.copy()))
    for here, there in zip(*found, strict=True):
        assert here.shape == there.shape and np.abs(here - there).max() < 0.03 * np.ptp(there)


def test_sources_without_room(bundle_of: BundleOf, tmp_path: Path) -> None:
    engine = stand_in(bundle_of("t5"), tmp_path, 16)
    with pytest.raises(PromptError, match="has 17 tokens, and the engine takes 16"):
        engine.encode([np.arange(17)])


def test_each_pass_takes_the_smallest_profile(engine: TensorRtEngine) -> None:
    plan = engine._plan
    assert isinstance(plan, StandInPlan)
    plan.profiles.clear()
    cache = engine.new_cache(1, 128)
    prefill(engine, cache, list(range(5, 45)))
    for rows in (1, 2, 3, 8, 9, 64):
        ids = np.arange(rows)[None] + 5
        engine.forward(cache, ids, 40 + ids, np.tri(rows, dtype=np.bool_)[None], np.arange(rows)[None])
    assert plan.profiles == [0, 0, 1, 1, 2, 3, 4, 6]


@pytest.mark.parametrize("drafter", ["ngram", "medusa"])
def test_drafts_change_no_token(bundle: Bundle, engine: TensorRtEngine, drafter: str) -> None:
    """Speculative against plain decoding on this engine: buckets, padding and commits, over whole texts."""
    info = bundle.head("medusa")
    drafters = {"ngram": NGramDrafter(), "medusa": MedusaDrafter("medusa", engine.head(info), info.heads)}
    model = Model(bundle, engine, Tokenizer.load(bundle.path / "tokenizer"), drafters)  # type: ignore[arg-type]
    for prompt in ("abc abc abc abc ", "hello"):
        plain = model.generate(prompt, max_new_tokens=48, drafter="none", ignore_end=True)
        drafted = model.generate(prompt, max_new_tokens=48, drafter=drafter, ignore_end=True)
        assert drafted.token_ids == plain.token_ids and drafted.stats.drafted_tokens > 0


def test_caches_are_given_back(engine: TensorRtEngine) -> None:
    memory = engine._memory
    assert isinstance(memory, Memory)
    cache = engine.new_cache(1, 64)
    addresses = list(cache.addresses)  # type: ignore[attr-defined]
    memory.freed.clear()
    del cache
    assert memory.freed == addresses


def test_limits_are_said(engine: TensorRtEngine) -> None:
    assert engine.model.max_cache == TOKENS and not engine.exact
    with pytest.raises(EngineError, match=r"holds 192 tokens, and 4096 are wanted\. Fix: headstart build .* --cache 4096"):
        engine.new_cache(1, 4096)
    with pytest.raises(EngineError, match="one sequence at a time"):
        engine.new_cache(2, 64)


def test_nothing_built_and_another_version(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    with pytest.raises(EngineError, match=r"is not built for tensorrt\. Fix: headstart build"):
        TensorRtEngine.open(bundle, "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", types.SimpleNamespace(__version__="2.0"))
    info = EngineInfo(1, "trt-rtx:sm89", "", {"tensorrt_rtx": "1.7.1.116"}, {}, {}, {})
    with pytest.raises(EngineError, match=r"built with tensorrt_rtx 1\.7\.1\.116, and here is 2\.0"):
        open_library(info)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -3.14159, 65536.0], np.float32)
    assert widened(narrowed(values, "bfloat16"), "bfloat16").tolist() == [1.0, 1.0, 1.015625, -3.140625, 65536.0]
    assert widened(narrowed(values[:1], "float16"), "float16").tolist() == [1.0]

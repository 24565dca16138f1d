"""The TensorRT engine's host side, over stand-ins for the device and the plans: see tensorrt_stand_in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from random_head import add_random_head
from tensorrt_stand_in import SLOTS, TOKENS, Memory, StandInPlan, stand_in

from headstart.exporter.tensorrt.recordings import source_rows
from headstart.runtime.beam import BeamOptions, beam_search
from headstart.runtime.bundle import Bundle
from headstart.runtime.contract import HIDDEN, LOGITS
from headstart.runtime.drafters.medusa import MedusaDrafter
from headstart.runtime.drafters.ngram import NGramDrafter
from headstart.runtime.engines.device import DeviceSlots, Tensor
from headstart.runtime.engines.info import EngineInfo
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.engines.trt_engine import TensorRtEngine
from headstart.runtime.engines.trt_plans import open_library
from headstart.runtime.errors import EngineError, PromptError
from headstart.runtime.model import Model
from headstart.runtime.prefill import prefill, run_decoder
from headstart.runtime.scheduler import Scheduler
from headstart.runtime.sequence import Request
from headstart.runtime.tokenizer import Tokenizer

BundleOf = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def bundle(bundle_of: BundleOf, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A llama with a random Medusa head."""
    import shutil

    folder = tmp_path_factory.mktemp("tensorrt-engine")
    shutil.copytree(bundle_of("llama").path, folder / "bundle")
    add_random_head(folder / "bundle", folder / "head")
    return Bundle.load(folder / "bundle")


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
    cache = engine.graph("decoder").new_state(1, 128)
    first = prefill(engine, cache, prompt)
    found = [first[LOGITS].copy(), first[HIDDEN][:, -1].copy()]
    mask = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 0, 1]], np.bool_)[None]
    ids, positions = np.array([[9, 8, 7, 6, 5]]), 75 + np.array([[0, 1, 1, 2, 2]])
    tree = run_decoder(engine, cache, ids, positions, mask, np.arange(5)[None])
    found += [tree[LOGITS].copy(), tree[HIDDEN].copy()]
    cache.commit(0, [0, 2, 4])  # the root, its second child, that one's second child
    after = run_decoder(
        engine, cache, np.array([[4]]), np.array([[78]]), np.ones((1, 1, 1), np.bool_), np.zeros((1, 1), np.int64)
    )
    return [*found, after[LOGITS].copy()]


@pytest.mark.parametrize(("name", "rows"), [("t5", 48), ("bart", 40), ("whisper", 60)])
def test_encoders_equal_the_cpu_engine(bundle_of: BundleOf, tmp_path: Path, name: str, rows: int) -> None:
    """A source padded to the engine's size gives what it gives alone: what is behind it is masked everywhere."""
    bundle = bundle_of(name)
    engine, cpu = stand_in(bundle, tmp_path, rows), OnnxRuntimeEngine(bundle)
    generator = np.random.default_rng(0)
    shape = bundle.manifest.graphs["encoder"].inputs[0].shape[1:]
    is_text = bundle.manifest.model.source == "text"
    source = generator.integers(3, 300, 17) if is_text else generator.standard_normal(tuple(map(int, shape))).astype(np.float32)
    _check_source(engine, cpu, source, 17 if is_text else rows)


def _check_source(engine: TensorRtEngine, cpu: OnnxRuntimeEngine, source: NDArray[Any], rows: int) -> None:
    """The same states, in the rows that exist, and the same logits behind them."""
    found = []
    for one in (engine, cpu):
        cross = one.encode([source])
        assert cross.mask.sum() == rows
        cache = one.graph("decoder").new_state(1, 64, cross)
        ids = np.array([[1, 7, 9]])
        output = run_decoder(one, cache, ids, np.arange(3)[None], np.tri(3, dtype=np.bool_)[None], np.arange(3)[None])
        found.append((cross.hidden[:, :rows].astype(np.float32), output[LOGITS].copy()))
    for here, there in zip(*found, strict=True):
        assert here.shape == there.shape and np.abs(here - there).max() < 0.03 * np.ptp(there)


@pytest.mark.parametrize(("name", "shape", "rows"), [("moonshine", (9_000,), 22), ("speech2text", (70, 20), 18)])
def test_recordings_of_any_length_equal_the_cpu_engine(
    bundle_of: BundleOf, tmp_path: Path, name: str, shape: tuple[int, ...], rows: int
) -> None:
    """Moonshine normalises over all of its time: what an engine for a second hears of half of one is not padded."""
    bundle = bundle_of(name)
    engine = stand_in(bundle, tmp_path, source_rows(bundle, 0, 1.0), 1.0)
    source = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    _check_source(engine, OnnxRuntimeEngine(bundle), source, rows)
    with pytest.raises(PromptError, match=r"the engine takes (1600 to 16000|8 to 100)\. Fix: headstart build --audio-seconds"):
        engine.encode([np.zeros((16_001, *shape[1:]), np.float32)])


def test_recordings_are_heard_as_the_cpu_engine_hears_them(speech_bundle: Bundle, tmp_path: Path) -> None:
    """Front-end and encoder, each a plan of its own."""
    engine, cpu = stand_in(speech_bundle, tmp_path, 300), OnnxRuntimeEngine(speech_bundle)
    samples = np.random.default_rng(0).standard_normal(96_000).astype(np.float32)
    features = engine.features(samples)
    np.testing.assert_allclose(features, cpu.features(samples), atol=1e-5)
    _check_source(engine, cpu, features, 300)
    with pytest.raises(PromptError, match="has 5 samples, and the engine takes 96000 to 96000"):
        engine.features(samples[:5])


def test_sources_without_room(bundle_of: BundleOf, tmp_path: Path) -> None:
    engine = stand_in(bundle_of("t5"), tmp_path, 16)
    with pytest.raises(PromptError, match="has 17 tokens, and the engine takes 16"):
        engine.encode([np.arange(17)])


def test_each_pass_takes_the_smallest_profile(engine: TensorRtEngine) -> None:
    plan = plan_of(engine)
    plan.profiles.clear()
    cache = engine.graph("decoder").new_state(1, 128)
    prefill(engine, cache, list(range(5, 45)))
    for rows in (1, 2, 3, 8, 9, 64):
        ids = np.arange(rows)[None] + 5
        run_decoder(engine, cache, ids, 40 + ids, np.tri(rows, dtype=np.bool_)[None], np.arange(rows)[None])
    assert plan.profiles == [0, 0, 1, 1, 2, 3, 4, 6]


@pytest.mark.parametrize("drafter", ["ngram", "medusa"])
def test_drafts_change_no_token(bundle: Bundle, engine: TensorRtEngine, drafter: str) -> None:
    """Speculative against plain decoding on this engine: buckets, padding and commits, over whole texts."""
    info = bundle.head("medusa")
    drafters = {"ngram": NGramDrafter(), "medusa": MedusaDrafter("medusa", engine.graph("heads/medusa"), info.heads)}
    model = Model(bundle, engine, Tokenizer.load(bundle.path / "tokenizer"), drafters)  # type: ignore[arg-type]
    for prompt in ("abc abc abc abc ", "hello"):
        plain = model.generate(prompt, max_new_tokens=48, drafter="none", ignore_end=True)
        drafted = model.generate(prompt, max_new_tokens=48, drafter=drafter, ignore_end=True)
        assert drafted.token_ids == plain.token_ids and drafted.stats.drafted_tokens > 0


def memory_of(engine: TensorRtEngine) -> Memory:
    memory = engine._memory.device
    assert isinstance(memory, Memory)
    return memory


def slots_of(state: Any) -> dict[str, Tensor]:
    (part,) = state.parts
    assert isinstance(part, DeviceSlots)
    return part.tensors


def plan_of(engine: TensorRtEngine) -> StandInPlan:
    plan = engine.graph("decoder").executor.plan
    assert isinstance(plan, StandInPlan)
    return plan


def test_the_next_text_gets_the_memory_of_the_last(engine: TensorRtEngine) -> None:
    """What was captured as a CUDA graph stays good: addresses do not change, and nothing is allocated or freed."""
    prefill(engine, engine.graph("decoder").new_state(1, 64), [5, 6])
    memory, plan = memory_of(engine), plan_of(engine)
    held = dict(memory.allocated)
    plan.places.clear()
    for _ in range(2):
        cache = engine.graph("decoder").new_state(1, 64)
        prefill(engine, cache.row(0), [5, 6])
        prefill(engine, cache.row(0), [7, 8, 9, 10])  # a prompt, of another length than any before
        del cache
    assert plan.places[:2] == plan.places[2:] and memory.allocated == held
    first, second = engine.graph("decoder").new_state(1, 64), engine.graph("decoder").new_state(1, 64)
    assert not {tensor.address for tensor in slots_of(first).values()} & {
        tensor.address for tensor in slots_of(second).values()
    }


def test_a_view_keeps_the_memory_of_its_cache(engine: TensorRtEngine) -> None:
    view = engine.graph("decoder").new_state(1, 64).row(0)
    other = engine.graph("decoder").new_state(1, 64)
    assert slots_of(view) != slots_of(other)


def test_greedy_decoding_fetches_best_tokens_alone(bundle: Bundle, engine: TensorRtEngine) -> None:
    """A round of a chain of three: one copy up, of tokens, positions and [T, T]; four numbers down, each int32; no moves."""
    memory, prompt = memory_of(engine), [5, 9, 17, 30]
    cache = engine.graph("decoder").new_state(1, 64)
    prefill(engine, cache, prompt)
    memory.traffic.clear()
    rows = np.arange(4)[None]
    output = run_decoder(engine, cache, rows + 5, rows + 4, np.tri(4, dtype=np.bool_)[None], rows)
    output.wait()
    best = [output.scores(0).best(row) for row in range(4)]
    cache.commit(0, [0, 1])
    assert memory.moved("down") == [4 * 4] and memory.moved("copy") == []
    (up,) = memory.moved("up")
    assert up == 5 * 256 < SLOTS * 4 * 2, "five small tensors, each aligned: less than a mask of every slot"
    memory.traffic.clear()
    logits, hidden = output.scores(0)[2], output.rows(HIDDEN, 0, [-1])[0]
    model = bundle.manifest.model
    assert memory.moved("down") == [2 * model.vocab_size, 2 * model.hidden_size], "one row of each"
    assert (logits == output[LOGITS][0, 2]).all() and (hidden == output[HIDDEN][0, 3]).all()
    assert best == output[LOGITS][0].argmax(-1).tolist()


def test_commits_are_one_copy_where_caches_lie_in_one_piece(engine: TensorRtEngine) -> None:
    """Two layers' keys and values, two heads each: rows 4 and 5 go behind the root together, in all eight planes."""
    memory, cache = memory_of(engine), engine.graph("decoder").new_state(1, 64)
    planes = [memory.view(tensor.address, tensor.shape[1:], np.float16) for tensor in slots_of(cache).values()]
    for number, plane in enumerate(planes):
        plane[...] = np.arange(SLOTS)[None, :, None] + 300 * number
    cache.lengths[:] = 10
    memory.traffic.clear()
    cache.commit(0, [0, 4, 5])
    assert len(memory.moved("copy")) == 1 and cache.lengths.tolist() == [13]
    for number, plane in enumerate(planes):
        assert (plane[:, 10:14, 0] == np.array([10, 14, 15, 13]) + 300 * number).all()


@pytest.fixture(scope="module")
def engine_of_three(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> TensorRtEngine:
    return stand_in(bundle, tmp_path_factory.mktemp("three"), batch=3)


@pytest.mark.parametrize("drafter", ["none", "medusa"])
def test_sequences_together_are_what_they_are_alone(bundle: Bundle, engine_of_three: TensorRtEngine, drafter: str) -> None:
    """Prompts of unequal length, two and three of at most three: tokens do not depend on what stands beside."""
    info = bundle.head("medusa")
    drafters = {"medusa": MedusaDrafter("medusa", engine_of_three.graph("heads/medusa"), info.heads)}
    model = Model(bundle, engine_of_three, Tokenizer.load(bundle.path / "tokenizer"), drafters)  # type: ignore[arg-type]
    prompts = ["abc abc abc abc ", "hello", "one two "]
    alone = [model.generate(p, max_new_tokens=24, drafter=drafter, ignore_end=True).token_ids for p in prompts]
    for count in (2, 3):
        results = model.generate(prompts[:count], max_new_tokens=24, drafter=drafter, ignore_end=True)
        assert [result.token_ids for result in results] == alone[:count]


def test_beams_are_gathered_on_the_device(bundle: Bundle, engine_of_three: TensorRtEngine) -> None:
    options = BeamOptions(num_beams=3, max_new_tokens=12)
    ours, theirs = (beam_search(one, [5, 9, 17], options)[0] for one in (engine_of_three, OnnxRuntimeEngine(bundle)))
    assert ours.token_ids == theirs.token_ids and abs(ours.score - theirs.score) < 0.02


def test_sources_together_are_what_they_are_alone(bundle_of: BundleOf, tmp_path: Path) -> None:
    """Sources join one after another: each one's states follow it to the device, to its own row."""
    bundle = bundle_of("t5")
    engine = stand_in(bundle, tmp_path, 48, batch=2)
    sources = [np.arange(3, 20), np.arange(40, 49)]

    def decode(sources: list[NDArray[Any]]) -> list[list[int]]:
        scheduler, drafter = Scheduler(engine), NGramDrafter()
        requests = [Request((0,), 16, drafter=drafter, source=source) for source in sources]
        texts = [scheduler.sequence(scheduler.add(request)) for request in requests]
        while not scheduler.idle:
            scheduler.step()
        return [text.token_ids for text in texts]

    assert decode(sources) == [decode([source])[0] for source in sources]


def test_limits_are_said(engine: TensorRtEngine) -> None:
    assert engine.model.max_cache == TOKENS and not engine.exact
    with pytest.raises(EngineError, match=r"holds 192 tokens, and 4096 are wanted\. Fix: headstart build .* --cache 4096"):
        engine.graph("decoder").new_state(1, 4096)
    with pytest.raises(EngineError, match=r"1 sequences together, and 2 are wanted\. Fix: headstart build .* --batch 2"):
        engine.graph("decoder").new_state(2, 64)


def test_nothing_built_and_another_version(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    with pytest.raises(EngineError, match=r"is not built for tensorrt\. Fix: headstart build"):
        TensorRtEngine.open(bundle, "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", types.SimpleNamespace(__version__="2.0"))
    info = EngineInfo(1, "trt-rtx:sm89", "", {"tensorrt_rtx": "1.7.1.116"}, {}, {}, {})
    with pytest.raises(EngineError, match=r"built with tensorrt_rtx 1\.7\.1\.116, and here is 2\.0"):
        open_library(info)

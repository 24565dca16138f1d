"""Every encoder-decoder, exported, against transformers: what the encoder gives, greedy tokens, trees, and padded sources."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from architectures import BART_SIZES, ENCODER_DECODERS, T5_SIZES, tiny_model
from numpy.typing import NDArray
from transformers import DynamicCache, EncoderDecoderCache
from trees import random_tree

from headstart.calibration.verify import verify
from headstart.exporter.comparison import all_logits
from headstart.exporter.export import export
from headstart.exporter.golden import decoder_start, reference_greedy
from headstart.exporter.seq2seq import cache_infos, encoder_input, feature_shape
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.contract import LOGITS
from headstart.runtime.drafters.ngram import NGramDrafter
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.engines.ort_session import open_session
from headstart.runtime.errors import CheckpointError, PromptError
from headstart.runtime.loading import load
from headstart.runtime.prefill import open_state, prefill, run_decoder
from headstart.runtime.scheduler import Scheduler
from headstart.runtime.sequence import Request
from headstart.runtime.tree import ROOT

BundleOf = Callable[[str], Bundle]
AUDIO = {"whisper", "moonshine", "speech2text"}
LENGTHS = {"input_ids": (19, 7), "input_values": (16000, 9000), "input_features": (120, 75)}
TEXT = [name for name in ENCODER_DECODERS if name not in AUDIO]


def sources_of(model: Any, seed: int = 2) -> list[NDArray[Any]]:
    """Two sources of unequal lengths, where the model takes such."""
    generator, name = np.random.default_rng(seed), encoder_input(model)
    if name == "input_ids":
        return [generator.integers(3, 298, length) for length in LENGTHS[name]]
    shapes = [feature_shape(model, length) for length in LENGTHS[name]]
    return [0.5 * generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def reference_states(model: Any, source: NDArray[Any]) -> list[NDArray[np.float32]]:
    """[E, H] encoder states, and [G, E, D] cross-attention keys and values, by transformers alone."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    read = {encoder_input(model): torch.from_numpy(source)[None], "decoder_input_ids": torch.tensor([[decoder_start(model)]])}
    with torch.no_grad():
        out = model(**read, past_key_values=cache, use_cache=True)
    pairs = [(layer.keys, layer.values) for layer in cache.cross_attention_cache.layers]
    return [state[0].numpy() for state in (out.encoder_last_hidden_state, *(one for pair in pairs for one in pair))]


def assert_near(ours: NDArray[Any], theirs: NDArray[Any]) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-4 * np.ptp(theirs)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_states_and_cross_caches_equal_torch(name: str, bundle_of: BundleOf) -> None:
    model, engine = tiny_model(name), OnnxRuntimeEngine(bundle_of(name))
    sources = sources_of(model)
    state = engine.encode(sources)
    assert state.mask.sum(axis=1).tolist() == [reference_states(model, source)[0].shape[0] for source in sources]
    for row, source in enumerate(sources):
        hidden, *cross = reference_states(model, source)
        assert_near(state.hidden[row, state.mask[row]], hidden)
        assert len(cross) == len(state.buffers)
        for ours, theirs in zip(state.buffers, cross, strict=True):
            assert_near(ours[row][:, state.mask[row]], theirs)


@pytest.mark.parametrize("name", TEXT)
def test_the_encoder_masks_padding(name: str, bundle_of: BundleOf) -> None:
    """A batch of two sources in one run, the shorter padded: its states are those it has alone."""
    bundle, model = bundle_of(name), tiny_model(name)
    sources = sources_of(model)
    ids = np.full((2, max(map(len, sources))), model.config.get_text_config().pad_token_id or 0)
    mask = np.arange(ids.shape[1]) < np.array([[len(source)] for source in sources])
    ids[mask] = np.concatenate(sources)
    session = open_session(bundle.path / bundle.manifest.graphs["encoder"].file, 1)
    outputs = session.run(None, {contract.INPUT_IDS: ids, contract.ENCODER_MASK: mask})
    for row, source in enumerate(sources):
        hidden, *cross = reference_states(model, source)
        assert_near(outputs[0][row, : len(source)], hidden)
        for ours, theirs in zip(outputs[1:], cross, strict=True):
            assert_near(ours[row, :, : len(source)], theirs)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_no_size_depends_on_what_a_tensor_holds(name: str, bundle_of: BundleOf) -> None:
    """Builders for GPUs refuse what indexing by a mask makes: sizes that only running the graph tells."""
    bundle = bundle_of(name)
    for graph in bundle.manifest.graphs.values():
        assert not {node.op_type for node in ir.load(bundle.path / graph.file).graph} & {"NonZero", "Compress", "Unique"}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_greedy_tokens_equal_transformers_generate(name: str, bundle_of: BundleOf) -> None:
    """A batch of sources, padded to the longer, drafted and undrafted, gives each source's own tokens."""
    model, engine = tiny_model(name), OnnxRuntimeEngine(bundle_of(name))
    sources, start = sources_of(model), decoder_start(model)
    wanted = [reference_greedy(model, np.array([[start]]), 32, source[None])[0].tolist() for source in sources]
    assert wanted[0] != wanted[1] and min(len(set(tokens)) for tokens in wanted) > 2, "what repeats itself proves little"
    for drafter in (None, NGramDrafter()):
        scheduler = Scheduler(engine)
        requests = [Request((start,), 32, drafter=drafter, source=source) for source in sources]
        texts = [scheduler.sequence(scheduler.add(request)) for request in requests]
        while not scheduler.idle:
            scheduler.step()
        assert [text.output_ids for text in texts] == wanted


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_tree_rows_equal_their_paths(name: str, bundle_of: BundleOf) -> None:
    """Each node of a random tree gets the logits it would get as the end of its own chain."""
    engine = OnnxRuntimeEngine(bundle_of(name))
    generator, source = np.random.default_rng(3), sources_of(tiny_model(name))[0]
    prompt = generator.integers(3, 300, 20).tolist()
    tree = random_tree(generator, 9, 300)
    cache = open_state(engine, 64, source)
    prefill(engine, cache, prompt[:-1])
    rows = len(tree) + 1
    token_ids = np.array([[prompt[-1], *tree.token_ids]])
    positions = len(prompt) - 1 + tree.depths()[None]
    output = run_decoder(engine, cache, token_ids, positions, tree.ancestor_mask()[None], np.arange(rows)[None])
    for row in range(rows):
        path, node = [], row - 1
        while node != ROOT:
            path.insert(0, int(tree.token_ids[node]))
            node = int(tree.parents[node])
        alone = all_logits(engine, np.array(prompt + path), source)[-1]
        assert_near(output[LOGITS][0, row], alone)


def test_a_source_that_does_not_fit(bundle_of: BundleOf) -> None:
    model = load(bundle_of("bart").path)
    with pytest.raises(PromptError, match=r"300 tokens or frames.*at most 256"):
        model.generate("x" * 300)
    with pytest.raises(PromptError, match="reads text"):
        model.generate(features=np.zeros((20, 120), np.float32))
    speech = load(bundle_of("whisper").path)
    with pytest.raises(PromptError, match=r"shape \[20, 100\].*takes \[20, 120\]"):
        speech.generate(features=np.zeros((20, 100), np.float32))
    with pytest.raises(PromptError, match="reads audio features"):
        speech.generate("text")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("BigBirdPegasus", BART_SIZES, "sees blocks of a long source"),
        (
            "ProphetNet",
            {"vocab_size": 300, "hidden_size": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
            "counts positions",
        ),
        ("SwitchTransformers", {**T5_SIZES, "num_experts": 2}, "needs more of its cache or inputs"),
    ],
)
def test_what_does_not_fit_the_contract(name: str, settings: dict[str, Any], message: str) -> None:
    config = getattr(transformers, f"{name}Config")(**settings)
    with pytest.raises(CheckpointError, match=message):
        cache_infos(getattr(transformers, f"{name}ForConditionalGeneration")(config).eval())


def test_a_draft_model_reads_the_source_too(bundle_of: BundleOf) -> None:
    """The target as its own draft model is always right; another model with an encoder changes nothing."""
    options = {"max_new_tokens": 26, "ignore_end": True}
    texts = ["some source", "another, longer source"]
    model = load(bundle_of("t5").path, draft_model=bundle_of("t5").path)
    plain = model.generate(texts, drafter="none", **options)
    same = model.generate(texts, drafter="draft_model", draft_nodes=4, **options)
    assert [r.token_ids for r in same] == [r.token_ids for r in plain]
    assert {r.stats.verify_calls for r in same} == {5}
    other = load(bundle_of("t5").path, draft_model=bundle_of("flan_t5").path)
    assert [r.token_ids for r in other.generate(texts, drafter="draft_model", **options)] == [r.token_ids for r in plain]


def test_generate_starts_behind_the_decoder_prompt(bundle_of: BundleOf) -> None:
    model = load(bundle_of("t5").path)
    free = model.generate("some source", max_new_tokens=8, ignore_end=True)
    forced = model.generate("some source", max_new_tokens=6, ignore_end=True, decoder_prompt=free.token_ids[:2])
    assert forced.token_ids == free.token_ids[2:] and forced.prompt_tokens == 3
    batch = model.generate(["some source", "another, longer source"], max_new_tokens=8, ignore_end=True)
    assert batch[0].token_ids == free.token_ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_half_precision(name: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Both graphs take and give float16, and stay within its tolerance of the checkpoint's own golden outputs."""
    bundle = export(checkpoint_of(name), tmp_path / "half", dtype="float16")
    tensors = [tensor for graph in bundle.manifest.graphs.values() for tensor in (*graph.inputs, *graph.outputs)]
    assert "float32" not in {tensor.dtype for tensor in tensors}
    assert verify(bundle.path, max_new_tokens=12, samples=100).ok

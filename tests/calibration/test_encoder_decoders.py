"""Encoder-decoders quantized by what they read: both graphs are observed, and what is built decodes as it did."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import soundfile
from speech import RATE, recording

from headstart.calibration.feeds import DecoderFeeds, EncoderFeeds, decoder_feeds
from headstart.calibration.observers import observe
from headstart.calibration.passages import Passage, calibration_passages
from headstart.calibration.quantize import DECODER, ENCODER, QuantizeOptions, quantize
from headstart.calibration.verify import verify
from headstart.exporter.build import build
from headstart.exporter.passes.linear import Linear, is_lm_head, linears
from headstart.exporter.passes.surgery import constant_of, producer
from headstart.runtime.bundle import Bundle
from headstart.runtime.contract import LOGITS
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import OptionError, PromptError
from headstart.runtime.prefill import last_logits, open_state, prefill, run_decoder

BundleOf = Callable[[str], Bundle]
Made = Callable[[str, QuantizeOptions], Bundle]
TOKENS = 512
STATIC = QuantizeOptions(activations="static", kv_cache="int8", calibration_tokens=TOKENS)
SMOOTH = QuantizeOptions(method="smoothquant", activations="static", calibration_tokens=TOKENS)
GPTQ = QuantizeOptions(method="gptq", calibration_tokens=TOKENS)
GPTQ4 = QuantizeOptions(weights="int4", method="gptq", calibration_tokens=TOKENS)
AWQ = QuantizeOptions(method="awq", kv_cache="int8", calibration_tokens=TOKENS)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, every second with its target."""
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp("texts") / "sources.jsonl"
    words = ["".join(rng.choice(list("etaoin shrdlu"), 40)) for _ in range(32)]
    pairs = enumerate(zip(words[::2], words[1::2], strict=True))
    file.write_text("\n".join(json.dumps({"prompt": a} | ({"target": b} if i % 2 else {})) for i, (a, b) in pairs))
    return file


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    for i in range(3):
        soundfile.write(folder / f"{i}.wav", recording(1.0 + i, seed=i), RATE)
    (folder / "sounds.jsonl").write_text(
        "\n".join(json.dumps({"audio": f"{i}.wav", "text": "it is ten " * 8}) for i in range(3))
    )
    return folder / "sounds.jsonl"


@pytest.fixture(scope="module")
def made(
    bundle_of: BundleOf, speech_bundle: Bundle, texts: Path, sounds: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """A quantized and built copy of a tiny model; each once."""
    folder, known = tmp_path_factory.mktemp("quantized"), {}

    def make(name: str, options: QuantizeOptions) -> Bundle:
        if (name, options) not in known:
            target = folder / str(len(known))
            source, data = (speech_bundle, sounds) if name == "whisper" else (bundle_of(name), texts)
            quantize(source.path, target, options, data)
            build(target)
            known[name, options] = Bundle.load(target)
        return known[name, options]

    return make


CASES = [("t5", STATIC), ("bart", GPTQ4), ("bart", SMOOTH), ("bart", AWQ), ("whisper", STATIC), ("whisper", GPTQ)]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_is_built_decodes_losslessly(made: Made, name: str, options: QuantizeOptions) -> None:
    """`build` has held the lowered graphs against the canonical ones; here drafts against plain decoding, and both graphs."""
    bundle = made(name, options)
    report = verify(bundle.path, max_new_tokens=12, samples=100)
    assert report.ok and "ngram" in [check.drafter for check in report.greedy]
    assert all(linear.quantized for file in (DECODER, ENCODER) for linear in linears(ir.load(bundle.path / file)))
    assert bundle.manifest.quantization["method"] == options.method
    decoder = bundle.manifest.graphs["decoder"]
    assert {slots.dtype for slots in decoder.slots} == ({"int8"} if options.kv_cache == "int8" else {"float32"})
    assert {pair.dtype for pair in decoder.reads} == {"float32"}, "the source's are float: they are read, not grown"


@pytest.mark.parametrize("name", ["t5", "whisper"])
@pytest.mark.parametrize("file", [DECODER, ENCODER])
def test_fixed_scales_stand_in_both_graphs(made: Made, name: str, file: str) -> None:
    model = ir.load(made(name, STATIC).path / file)
    inner = [linear for linear in linears(model) if not is_lm_head(linear, made(name, STATIC).manifest.model.vocab_size)]
    for linear in inner:
        dequantize = producer(linear.node.inputs[0], "DequantizeLinear")
        assert dequantize is not None and constant_of(dequantize.inputs[1]).shape == (), linear.name  # type: ignore[union-attr]
    assert sum("EncDecAttention" in linear.name or "encoder_attn" in linear.name for linear in inner) == 4
    made_so_far: set[Any] = {*model.graph.inputs, *model.graph.initializers.values(), None}
    for node in model.graph:  # the standard wants nodes behind what they read
        assert made_so_far.issuperset(node.inputs), node.name
        made_so_far.update(node.outputs)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_chain_rows_are_bit_equal_to_single_steps(made: Made, name: str) -> None:
    bundle = made(name, STATIC if name == "t5" else AWQ)
    engine, source = OnnxRuntimeEngine.open(bundle), np.arange(5, 30)
    prompt, chain = list(range(5, 15)), list(range(30, 46))
    stepwise, at_once = open_state(engine, 64, source), open_state(engine, 64, source)
    assert all(array.dtype == np.int8 for array in at_once.parts[0].arrays.values())
    prefill(engine, stepwise, prompt)
    singles = [last_logits(prefill(engine, stepwise, [token])) for token in chain]
    prefill(engine, at_once, prompt)
    rows = np.arange(len(chain))[None]
    output = run_decoder(engine, at_once, np.array([chain]), len(prompt) + rows, np.tri(len(chain), dtype=np.bool_)[None], rows)
    assert (output[LOGITS][0] == np.stack(singles)).all()


def named(model: Any, part: str) -> list[Linear]:
    found = [linear for linear in linears(model) if part in linear.name]
    assert found
    return found


def test_cross_attention_is_observed_on_both_sides(bundle_of: BundleOf, texts: Path) -> None:
    bundle = bundle_of("t5")
    passages = list(calibration_passages(bundle, texts, TOKENS))
    encoder, decoder = (ir.load(bundle.path / file) for file in (ENCODER, DECODER))
    keys = observe(encoder, named(encoder, "EncDecAttention.k"), EncoderFeeds(bundle, passages))
    assert list(keys) == ["encoder_hidden"], "all layers' cross-attention reads one value"
    assert keys["encoder_hidden"].rows == sum(len(passage.source) for passage in passages if passage.source is not None)
    with decoder_feeds(bundle, passages, encoder) as feeds:
        outputs = observe(decoder, named(decoder, "EncDecAttention.o"), feeds)
    assert {seen.rows for seen in outputs.values()} == {sum(len(passage.token_ids) for passage in passages)}


def test_the_decoder_is_observed_behind_its_source(bundle_of: BundleOf) -> None:
    bundle, ids = bundle_of("t5"), np.arange(5, 25)
    encoder, decoder = (ir.load(bundle.path / file) for file in (ENCODER, DECODER))

    def gram(part: str, source: Any) -> Any:
        with decoder_feeds(bundle, [Passage(ids, source=source)], encoder) as feeds:
            return next(iter(observe(decoder, named(decoder, part), feeds).values())).gram

    one, other = np.arange(40, 50), np.arange(60, 90)
    assert (
        np.abs(gram("block.0.layer.1.EncDecAttention.o", one) - gram("block.0.layer.1.EncDecAttention.o", other)).max() > 1e-3
    )
    np.testing.assert_array_equal(gram("block.0.layer.0.SelfAttention.o", one), gram("block.0.layer.0.SelfAttention.o", other))


def test_no_source_is_read_before_something_reads_it(bundle_of: BundleOf) -> None:
    """Self-attention of the first layer needs none: the encoder, which is not even there, is not run."""
    bundle = bundle_of("bart")
    decoder = ir.load(bundle.path / DECODER)
    feeds = DecoderFeeds(bundle, [Passage(np.arange(5, 25), source=np.arange(9))])
    (seen,) = observe(decoder, named(decoder, "layers.0.self_attn.q_proj"), feeds).values()
    assert seen.rows == 20


def test_each_layer_is_entered_once(bundle_of: BundleOf, texts: Path, tmp_path: Path) -> None:
    """One encoder layer and the cross-attention of two decoder layers; then two decoder layers."""
    entered: list[tuple[int, int]] = []
    quantize(
        bundle_of("t5").path,
        tmp_path / "out",
        GPTQ,
        texts,
        progress=lambda what, done, of: entered.append((done, of)) if what == "calibration" else None,
    )
    assert entered == [(1, 3), (2, 3), (3, 3), (1, 2), (2, 2)]


def test_what_is_refused(bundle_of: BundleOf, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"are measured on text\. Fix: --data FILE"):
        quantize(bundle_of("t5").path, tmp_path / "out", STATIC)
    (tmp_path / "few.jsonl").write_text(json.dumps({"prompt": "a source", "target": "short"}), "utf-8")
    with pytest.raises(OptionError, match=r"few\.jsonl gives the decoder \d+ tokens to read"):
        quantize(bundle_of("t5").path, tmp_path / "out", GPTQ, tmp_path / "few.jsonl")
    with pytest.raises(PromptError, match="reads audio features, and the prompt is not"):
        quantize(bundle_of("whisper").path, tmp_path / "out", GPTQ, tmp_path / "few.jsonl")
    assert not (tmp_path / "out").exists()

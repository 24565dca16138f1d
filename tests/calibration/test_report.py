"""The comparison of bundles: nothing lost against itself, something lost to int4, and what cannot be compared."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from speech import RATE, recording

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.calibration.report import QuantizationReport, compare, draw
from headstart.exporter.comparison import all_logits
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import MissingExtraError, OptionError
from headstart.runtime.loading import load
from headstart.runtime.tokenizer import Tokenizer
from headstart.screen import show_quantization, write_json

BundleOf = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "held_out.txt"
    file.write_text("".join(np.random.default_rng(8).choice(list("etaoin shrdlu"), 700)), "utf-8")
    return file


@pytest.fixture(scope="module")
def report(bundle_of: BundleOf, text: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizationReport:
    reference = bundle_of("llama").path
    int4 = quantize(reference, tmp_path_factory.mktemp("report") / "int4", QuantizeOptions(weights="int4")).path
    return compare([reference, reference, int4], text, ["a note", "her data"], max_new_tokens=8)


def test_a_bundle_equals_itself(report: QuantizationReport) -> None:
    reference, same, _ = report.schemes
    assert reference.scheme == "float32"
    for one in (reference, same):
        assert one.kl == 0 and one.agreement == 1
    assert same.perplexity == reference.perplexity and same.acceptance == reference.acceptance


def test_a_quantized_bundle_differs_and_is_smaller(report: QuantizationReport) -> None:
    reference, _, int4 = report.schemes
    assert int4.scheme == "int4 rtn 32" and not int4.built
    assert int4.kl > 1e-4 and int4.agreement < 1 and int4.perplexity != reference.perplexity
    assert int4.disk_mb < 0.8 * reference.disk_mb
    assert int4.memory_mb > 10  # of a process of its own, which has loaded Python and ONNX Runtime at least
    assert list(int4.acceptance) == list(reference.acceptance) and min(int4.acceptance.values()) >= 1


def test_perplexity_is_of_the_next_token(report: QuantizationReport, bundle_of: BundleOf, text: Path) -> None:
    bundle = bundle_of("llama")
    window = bundle.manifest.model.max_cache
    ids = np.array(Tokenizer.load(bundle.path / "tokenizer").encode(text.read_text("utf-8")), np.int64)
    windows = ids[: len(ids) // window * window].reshape(-1, window)
    engine, losses = OnnxRuntimeEngine(bundle), []
    for row in windows:
        logits = all_logits(engine, row).astype(np.float64)
        losses.append(np.log(np.exp(logits).sum(axis=-1))[:-1] - logits[np.arange(window - 1), row[1:]])
    assert report.tokens == windows.size
    assert report.schemes[0].perplexity == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-6)


@pytest.fixture(scope="module")
def answered(bundle_of: BundleOf, tmp_path_factory: pytest.TempPathFactory) -> QuantizationReport:
    """A T5 against itself: what it writes of the first sources is their target, of the third a wrong one, of the last none."""
    folder, model = tmp_path_factory.mktemp("answered"), load(bundle_of("t5").path)
    sources = ["a source", "another", "a third", "and one more"]
    written = [model.generate(source, max_new_tokens=40, drafter="none").text for source in sources]
    targets = [*written[:2], "something else", None]
    lines = [{"prompt": a} | ({} if b is None else {"target": b}) for a, b in zip(sources, targets, strict=True)]
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    bundles = [model.bundle.path] * 2
    return compare(bundles, folder / "held_out.jsonl", ["a source"], max_new_tokens=40)


def test_outputs_are_held_against_their_targets(answered: QuantizationReport) -> None:
    for one in answered.schemes:
        assert one.exact == pytest.approx(2 / 3) and one.word_error_rate is None, "three have targets; words are of speech"
        assert one.kl == 0 and one.agreement == 1
        assert set(one.acceptance) == {"ngram", "source_copy"}
    assert (answered.passages, answered.left_out, answered.prompts) == (4, 0, 1)


def test_perplexity_is_of_the_target_given_its_source(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle, target = bundle_of("t5"), "what should come of it" * 4
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "a source", "target": target}), "utf-8")
    report = compare([bundle.path] * 2, tmp_path / "one.jsonl", max_new_tokens=4)
    tokenizer = Tokenizer.load(bundle.path / "tokenizer")
    ids = np.array([0, *tokenizer.encode(target, special=False), 2], np.int64)
    logits = all_logits(OnnxRuntimeEngine(bundle), ids, np.array(tokenizer.encode("a source"))).astype(np.float64)[:-1]
    loss = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    assert report.schemes[0].perplexity == pytest.approx(float(np.exp(loss.mean())), rel=1e-6)


def test_words_are_counted_of_speech(speech_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "one.wav", recording(1.0), RATE)
    lines = [json.dumps({"audio": "one.wav", "text": "it is ten past ten"})] * 8
    (tmp_path / "sounds.jsonl").write_text("\n".join(lines), "utf-8")
    report = compare([speech_bundle.path] * 2, tmp_path / "sounds.jsonl", max_new_tokens=12)
    assert report.schemes[0].exact == 0 and report.schemes[0].word_error_rate == report.schemes[1].word_error_rate
    assert report.schemes[0].word_error_rate is not None and report.schemes[0].word_error_rate > 0
    assert report.schemes[0].memory_mb > 10 and report.schemes[0].acceptance == {}
    show_quantization(report)
    assert "word error rate" in capsys.readouterr().out


def test_it_is_written_and_shown(report: QuantizationReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "report.json", report)
    read = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert read["schemes"][2]["kl"] == report.schemes[2].kl and read["tokens"] == report.tokens
    show_quantization(report)
    shown = capsys.readouterr().out
    assert "held_out.txt" in shown and "int4 rtn 32" in shown and "perplexity" in shown


def without_heads(report: QuantizationReport) -> QuantizationReport:
    """The reference has a drafter that the others lack."""
    first = dataclasses.replace(report.schemes[0], acceptance=report.schemes[0].acceptance | {"medusa": 1.5})
    last = dataclasses.replace(report.schemes[2], acceptance=report.schemes[2].acceptance | {"other": 2.5})
    return dataclasses.replace(report, schemes=(first, report.schemes[1], last))


def test_bundles_need_not_have_the_same_drafters(
    report: QuantizationReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    mixed = without_heads(report)
    show_quantization(mixed)
    shown = capsys.readouterr().out
    assert "medusa" in shown and "1.50" in shown and "other" in shown and "2.50" in shown
    draw(mixed, tmp_path / "mixed.png")
    assert (tmp_path / "mixed.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_without_matplotlib_names_the_extra(
    report: QuantizationReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'headstart\[bench\]'"):
        draw(report, tmp_path / "report.png")


def test_what_cannot_be_compared(bundle_of: BundleOf, text: Path, tmp_path: Path) -> None:
    llama = bundle_of("llama").path
    with pytest.raises(OptionError, match="at least one other bundle"):
        compare([llama], text, [])
    (tmp_path / "short.txt").write_text("a few words", "utf-8")
    with pytest.raises(OptionError, match=r"short\.txt holds \d+ tokens; at least 256 are needed\. Fix: "):
        compare([llama, llama], tmp_path / "short.txt", [])
    with pytest.raises(OptionError, match="differ in vocabulary or in what they read"):
        compare([llama, bundle_of("t5").path], text)

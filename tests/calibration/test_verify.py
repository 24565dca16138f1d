"""`verify` on intact bundles of every precision, and on one seeded fault after another: each must be reported."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from faulty import (
    FaultyEngine,
    LyingDrafter,
    UniformDrafts,
    UniformNotClaimed,
    best_not_drawn,
    hide_one_ancestor,
    kept_if_likely,
    shift_positions,
    show_one_stranger,
)
from random_head import add_random_head

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.calibration.verification.forms import check_forms
from headstart.calibration.verification.greedy import Judge, check_greedy, position
from headstart.calibration.verification.logits import Comparison
from headstart.calibration.verification.outcome import LogitCheck, Report
from headstart.calibration.verification.reference import Reference, Text, engine_precision
from headstart.calibration.verification.sampling import check_sampling
from headstart.calibration.verify import golden_texts, verify, verify_model
from headstart.exporter.build import build
from headstart.exporter.golden import read_golden
from headstart.runtime.bundle import GOLDEN, Bundle, write_manifest
from headstart.runtime.contract import HIDDEN, LOGITS
from headstart.runtime.drafters.ngram import NGramDrafter
from headstart.runtime.engines.info import ENGINE_FILE, built_engine, engine_folder
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.engines.ort_session import Provider
from headstart.runtime.errors import OptionError
from headstart.runtime.graph import HostOutputs
from headstart.runtime.loading import load
from headstart.runtime.model import Model
from headstart.runtime.output import hash_files
from headstart.runtime.rng import NumpyRng
from headstart.runtime.tokenizer import Tokenizer

BundleOf = Callable[[str], Bundle]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]
PROMPTS = ["def fib(n):\n    return", "import os\nimport os"]


@pytest.fixture(scope="session")
def sample(pycode: Bundle, made_once: MadeOnce) -> Callable[[str], Path]:
    """weights -> the pycode sample, built for the CPU."""

    def make(weights: str) -> Path:
        def write(folder: Path) -> None:
            if weights == "float32":
                shutil.copytree(pycode.path, folder)
            else:
                quantize(make("float32"), folder, QuantizeOptions(weights=weights))
            build(folder, force=True)

        return made_once(f"verified/pycode-{weights}", write)

    return make


@pytest.fixture(scope="session")
def llama(bundle_of: BundleOf, made_once: MadeOnce) -> Path:
    """A tiny llama with a random Medusa head, built for the CPU."""

    def write(folder: Path) -> None:
        shutil.copytree(bundle_of("llama").path, folder)
        add_random_head(folder, folder.with_name("llama-head"))
        build(folder)

    return made_once("verified/llama", write)


def with_engine(model: Model, engine: Any) -> Model:
    return Model(model.bundle, engine, model.tokenizer, model.generator.drafters)


# Intact bundles


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_an_intact_sample_has_no_fault(sample: Callable[[str], Path], weights: str) -> None:
    report = verify(sample(weights), PROMPTS, 24, samples=200)
    assert report.ok and report.device == "cpu", report
    assert report.precision == {"float32": "float32", "int8": "int8_per_row", "int4": "int4"}[weights]
    assert {check.drafter for check in report.greedy} == {"none", "medusa", "ngram"}
    assert all(check.accepted > 20 for check in report.sampling if check.drafter != "none"), "the rules were put to use"


def test_an_intact_float16_engine_has_no_fault(llama: Path, tmp_path: Path) -> None:
    """What is built for the CUDA provider, run on the CPU."""
    shutil.copytree(llama, tmp_path / "bundle")
    build(tmp_path / "bundle", "cuda")
    bundle = Bundle.load(tmp_path / "bundle")
    info = built_engine(bundle, "cuda")
    assert info is not None
    engine = OnnxRuntimeEngine(
        bundle, built=(info, engine_folder(bundle, "cuda")), provider=Provider(device="cuda", location="cpu")
    )
    model = Model(bundle, engine, Tokenizer.load(bundle.path / "tokenizer"), {"ngram": NGramDrafter()})
    report = verify_model(model, Reference.open(bundle), read_golden(bundle), ["abcabcabc"], 12, samples=100)
    assert report.ok and report.precision == "float16", report


# Broken files and numbers


def rewrite(bundle: Path, device: str = "cpu") -> None:
    """Make the hashes those of the present files, as if what they hold were meant."""
    write_manifest(bundle, Bundle.load(bundle, check_hashes=False).manifest)
    folder = bundle / "engines" / device
    document = json.loads((folder / ENGINE_FILE).read_text())
    files = hash_files(folder, lambda relative: relative.name != ENGINE_FILE)
    manifest = Bundle.load(bundle).manifest.files
    source = {name: manifest[name] for name in document["source"]}
    (folder / ENGINE_FILE).write_text(json.dumps(document | {"files": files, "source": source}))


@pytest.mark.parametrize("file", ["graphs/decoder.onnx.data", "engines/cpu/decoder.onnx", GOLDEN, "tokenizer/tokenizer.json"])
def test_one_flipped_byte_is_named(llama: Path, tmp_path: Path, file: str) -> None:
    """F33: the canonical graph's data as well, which nothing reads once an engine is built."""
    bundle = Path(shutil.copytree(llama, tmp_path / "bundle"))
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file).write_bytes(content)
    report = verify(bundle)
    assert not report.ok and [fault.where for fault in report.faults] == [file]
    assert "was changed after it was written" in report.faults[0].what


def edit_weight(file: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change the first weight with `name` in its own, in place, in the data file of an ONNX graph."""
    graph = ir.load(file).graph
    tensor = next(
        value.const_value
        for key, value in graph.initializers.items()
        if name in key and "scale" not in key and isinstance(value.const_value, ir.ExternalTensor)
    )
    assert isinstance(tensor, ir.ExternalTensor)
    shape, dtype = tuple(tensor.shape), tensor.dtype.numpy()
    change(np.memmap(tensor.path, dtype, "r+", tensor.offset or 0, shape))


def negate_one(array: Any) -> None:
    array[7, 5] = -array[7, 5]


def negate_all(array: Any) -> None:
    array[:] = -array


def set_nan(array: Any) -> None:
    array[1, 2] = np.nan


def test_a_nan_weight_names_the_first_bad_graph(llama: Path, tmp_path: Path) -> None:
    """F1: comparisons with NaN are false, so that no limit is ever exceeded."""
    bundle = Path(shutil.copytree(llama, tmp_path / "bundle"))
    edit_weight(bundle / "graphs/decoder.onnx", "model.layers.1.mlp.down_proj.weight", set_nan)
    rewrite(bundle)
    report = verify(bundle)
    assert not report.ok
    assert report.faults[0].where == "canonical decoder (graphs/decoder.onnx)"
    assert "1 of" in report.faults[0].what and "model.layers.1.mlp.down_proj.weight" in report.faults[0].what


def test_nan_that_only_an_engine_computes_is_a_fault(llama: Path) -> None:
    def poison(outputs: Any) -> HostOutputs:
        return HostOutputs({name: np.full_like(outputs[name], np.nan) for name in (LOGITS, HIDDEN)})

    model, bundle = load(llama), Bundle.load(llama)
    poisoned = with_engine(model, FaultyEngine(model.engine, poison=poison))
    report = verify_model(poisoned, Reference.open(bundle), read_golden(bundle), ["abc"], 8)
    assert not report.ok and report.faults[0].where == "cpu decoder"


def test_a_nan_golden_output_is_a_fault(llama: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(llama, tmp_path / "bundle"))
    golden = read_golden(Bundle.load(bundle))
    golden["top_logits"][0, 3, 1] = np.nan
    np.savez(bundle / GOLDEN, **golden)  # type: ignore[arg-type]
    rewrite(bundle)
    report = verify(bundle)
    assert not report.ok and report.faults[0].where == GOLDEN and "top_logits" in report.faults[0].what


def test_nan_is_within_no_limit() -> None:
    comparison = Comparison("engine", "golden outputs", "float32")
    comparison.add(np.full((2, 5), np.nan, np.float32), np.arange(10, dtype=np.float32).reshape(2, 5))
    assert not comparison.result().ok and "NaN" in comparison.result().problem
    assert not LogitCheck("engine", "golden outputs", "float32", 1, np.nan, np.nan, 1.0, 1.0).ok
    assert not Comparison("engine", "golden outputs", "float32").result().ok, "nothing compared is nothing shown"


# Wrong graphs


def flipped(bundle: Path, folder: Path, weight: str, change: Callable[[Any], None]) -> Path:
    """The bundle with a weight of its engine changed, and hashes that fit: as if a lowering pass had done it."""
    copy = Path(shutil.copytree(bundle, folder))
    edit_weight(copy / "engines/cpu/decoder.onnx", weight, change)
    rewrite(copy)
    return copy


def test_one_flipped_weight_is_a_fault_in_float32(sample: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = flipped(sample("float32"), tmp_path / "bundle", "layers.3.mlp.down_proj.weight", negate_one)
    report = verify(bundle, ["def"], 4, samples=0)
    assert next(check.subject for check in report.logits if not check.ok) == "engine"
    assert report.logits[0].ok, "the canonical graph is intact"


def test_a_layer_of_flipped_sign_is_a_fault_in_int8(sample: Callable[[str], Path], tmp_path: Path) -> None:
    """A single int8 weight moves logits by less than rounding does; such a change of a file is found by its hash."""
    bundle = flipped(sample("int8"), tmp_path / "bundle", "layers.3.self_attn.o_proj.weight", negate_all)
    report = verify(bundle, ["def"], 4, samples=0)
    worst = max(check.median / check.median_limit for check in report.logits)
    assert not report.ok and worst > 4


# Wrong masks, positions and slots


@pytest.mark.parametrize(
    ("fault", "found_by"),
    [
        ({"change": hide_one_ancestor}, {"trees", "commits", "batch"}),
        ({"change": show_one_stranger}, {"trees", "commits", "batch"}),
        ({"change": shift_positions}, {"trees", "commits", "batch"}),
        ({"slot_off": True}, {"commits", "batch"}),
    ],
)
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_wrong_masks_positions_and_slots_are_faults(
    sample: Callable[[str], Path], weights: str, fault: dict[str, Any], found_by: set[str]
) -> None:
    bundle = Bundle.load(sample(weights))
    engine = OnnxRuntimeEngine.open(bundle)
    texts = golden_texts(read_golden(bundle))
    checks = check_forms(FaultyEngine(engine, **fault), Reference.open(bundle), texts, engine_precision(engine), 3)
    assert {check.subject for check in checks if not check.ok} >= found_by - {"batch"}
    worst = max(check.largest / check.largest_limit for check in checks)
    assert worst > (1000 if weights == "float32" else 1.1), "outside"


def test_a_wrong_mask_shows_in_greedy_decoding(sample: Callable[[str], Path]) -> None:
    bundle = Bundle.load(sample("float32"))
    model = load(bundle.path)
    faulty = with_engine(model, FaultyEngine(model.engine, shift_positions))
    checks = check_greedy(faulty, Reference.open(bundle), PROMPTS, 48, "float32", lambda *_: None)
    by_name = {check.drafter: check for check in checks}
    assert by_name["none"].ok, "plain decoding has no tree"
    assert not by_name["medusa"].ok
    first = by_name["medusa"].divergences[0]
    assert first.kind == "fault" and first.gap > by_name["medusa"].tie_bound and first.expected != first.found


# Ties


def test_a_tie_is_the_references_and_within_its_bound(bundle_of: BundleOf) -> None:
    logits = np.array([0.0, 10.0, 9.99, 5.0], np.float32)
    one = position(logits, 2, 10.0)
    assert one.best == 1 and one.margin == pytest.approx(0.001, rel=1e-3) == one.gap
    assert position(logits, 3, 10.0).gap == pytest.approx(0.5)
    reference = Reference.open(bundle_of("llama"))
    assert Judge(reference, 0.002)._divergence(0, 0, 1, 2, 0.001, 0.001).kind == "tie"
    assert Judge(reference, 0.0005)._divergence(0, 0, 1, 2, 0.001, 0.001).kind == "fault"
    assert Judge(reference, 0.002)._divergence(0, 0, 1, 2, 0.001, float("nan")).kind == "fault"


# Sampling


SAMPLES = 600


def sampled(model: Model, name: str) -> Any:
    return next(check for check in sampling_checks(model)[0] if check.drafter == name)


def sampling_checks(model: Model) -> Any:
    return check_sampling(model, Reference.open(model.bundle), PROMPTS, SAMPLES, 16, lambda *_: None)


@pytest.fixture(scope="module")
def drafted(llama: Path) -> Model:
    """A model that is its own draft model, so that nearly all drafts are accepted."""
    model = load(llama, draft_model=llama)
    return with_drafters(model, {"draft_model": model.generator.drafters["draft_model"]})


def with_drafters(model: Model, drafters: dict[str, Any]) -> Model:
    return Model(model.bundle, model.engine, model.tokenizer, drafters)


def test_lossless_sampling_passes(drafted: Model) -> None:
    check = sampled(drafted, "draft_model")
    assert check.ok and check.accepted > SAMPLES / 2 and check.degrees >= 8
    assert 0 < check.detects < 0.35 and check.power == 0.99 and check.significance == 1e-6
    assert check == sampled(drafted, "draft_model"), "seeds are fixed"


@pytest.mark.parametrize("lie", [UniformNotClaimed(), best_not_drawn, kept_if_likely])
def test_a_drafter_that_lies_is_a_fault(drafted: Model, lie: Any) -> None:
    liar = LyingDrafter(drafted.generator.drafters["draft_model"], lie)
    check = sampled(with_drafters(drafted, {"draft_model": liar}), "draft_model")
    assert not check.ok and check.p_value < 1e-6


def test_a_rule_that_accepts_too_much_is_a_fault(drafted: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> Any:
        drafter = LyingDrafter(drafted.generator.drafters["draft_model"], UniformDrafts())
        return sampled(with_drafters(drafted, {"draft_model": drafter}), "draft_model")

    assert check().ok, "drafts far from the target, but honest"
    honest = NumpyRng.accept
    monkeypatch.setattr(NumpyRng, "accept", lambda self, probability: honest(self, probability**0.1))
    assert not check().ok


def test_biased_draws_are_a_fault_without_any_drafter(drafted: Model, monkeypatch: Any) -> None:
    honest = NumpyRng.choose
    monkeypatch.setattr(NumpyRng, "choose", lambda self, probabilities: honest(self, probabilities**1.5))
    assert not sampled(drafted, "none").ok


def test_logits_that_differ_from_pass_to_pass_do_not_look_like_biased_draws(drafted: Model) -> None:
    """Gemma 3 270M's, in int8, do. The draws are tested on given logits, the passes by themselves."""

    def noisy(share: float) -> Model:
        generator = np.random.default_rng(0)

        def disturb(outputs: Any) -> HostOutputs:
            noise = share * generator.standard_normal(outputs[LOGITS].shape).astype(np.float32)
            return HostOutputs({LOGITS: outputs[LOGITS] + noise * np.ptp(outputs[LOGITS]), HIDDEN: outputs[HIDDEN]})

        return with_engine(drafted, FaultyEngine(drafted.engine, poison=disturb))

    checks, (passes,) = sampling_checks(noisy(0.02))
    assert all(check.ok and not check.impossible for check in checks) and not passes.ok, "far more than float32 may"
    _, (passes,) = sampling_checks(drafted)
    assert passes.ok and passes.rows > SAMPLES


# Reports and options


def test_a_report_is_ok_only_if_all_of_it_is(llama: Path) -> None:
    report = verify(llama, ["abc"], 4, samples=0)
    assert report.ok and "sampled decoding was not checked" in report.notes
    bad = dataclasses.replace(report.logits[0], largest=1.0)
    assert not dataclasses.replace(report, logits=(bad, *report.logits[1:])).ok
    assert Report("b", "cpu", "float32", ()).ok


def test_what_cannot_be_verified(llama: Path) -> None:
    with pytest.raises(OptionError, match="--samples must be 0"):
        verify(llama, samples=-1)
    with pytest.raises(OptionError, match="device 'tpu' is unknown"):
        verify(llama, device="tpu")


def test_texts_of_one_token_are_taken(llama: Path) -> None:
    bundle = Bundle.load(llama)
    engine = OnnxRuntimeEngine.open(bundle)
    assert all(check.ok for check in check_forms(engine, Reference.open(bundle), [Text((5,))], "float32", 2))

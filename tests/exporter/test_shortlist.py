"""Short lists: which tokens they name, and that their logits are the target's own, as exported and as built."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from headstart.calibration import token_counts as counting
from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.calibration.shortlist import make_shortlist
from headstart.calibration.token_counts import coverage, most_used, own_texts, texts_of
from headstart.calibration.token_counts import token_counts as counted
from headstart.exporter import canonical
from headstart.exporter.build import build
from headstart.exporter.check import Inputs, Runner
from headstart.exporter.golden import read_golden
from headstart.exporter.heads import install
from headstart.exporter.heads.shortlist import add_shortlist
from headstart.exporter.lowering.lm_head import lm_head_of
from headstart.exporter.passes.surgery import Writer
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, GenerationRules, Manifest, write_manifest
from headstart.runtime.engines.info import LM_HEAD, EngineInfo, engine_folder
from headstart.runtime.errors import BundleError, EngineError, HeadError, OptionError, OutputError
from headstart.runtime.tokenizer import Tokenizer

BundleOf = Callable[[str], Bundle]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]
Outputs = dict[str, NDArray[Any]]
VOCAB, TINY_VOCAB, LISTED = 4096, 300, 512
LIST = "heads/shortlist"


def some_tokens(vocab_size: int = VOCAB, count: int = LISTED) -> NDArray[np.int64]:
    return np.random.default_rng(0).permutation(vocab_size)[:count]


def copy_of(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))


@pytest.fixture(scope="session")
def int8_pycode(pycode: Bundle, made_once: MadeOnce) -> Bundle:
    """Hidden size 256, vocabulary 4,096, tied: its LM head is in int8 and reads rotated states."""
    return Bundle.load(made_once("samples/pycode_int8", lambda folder: quantize(pycode.path, folder)))


def outputs_of(bundle: Bundle) -> tuple[Outputs, Outputs]:
    """(the decoder's, the short list's from its hidden states) of the canonical graphs."""
    golden = read_golden(bundle)
    inputs = Inputs(bundle, golden["input_ids"][:1], golden["sources"][:1] if "sources" in golden else None)
    if "encoder" in bundle.graphs:
        inputs.reference("encoder")
    return inputs.reference("decoder")[-1], inputs.reference(LIST)[-1]


def difference(short: Outputs, logits: NDArray[np.float32]) -> float:
    return float(np.abs(short[contract.SHORT_LOGITS] - logits[..., short[contract.SHORT_IDS]]).max())


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "opt", "bert_decoder", "t5", "whisper"])
def test_logits_are_the_target_s(architecture: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    """Whichever way round the LM head is stored, and whatever stands between the last layer and it."""
    path, token_ids = copy_of(bundle_of(architecture), tmp_path), some_tokens(TINY_VOCAB, 64)
    info = add_shortlist(path, token_ids)
    assert (info.name, info.family, info.vocab_size, info.shared) == ("shortlist", "shortlist", TINY_VOCAB, {})
    decoder, short = outputs_of(Bundle.load(path))
    rows = decoder[contract.LOGITS].shape[1]
    assert short[contract.SHORT_LOGITS].shape == (1, rows, 64) and rows > 1
    assert (short[contract.SHORT_IDS] == np.sort(token_ids)).all()
    assert difference(short, decoder[contract.LOGITS]) < 1e-5


@pytest.mark.parametrize("architecture", ["gemma2", "cohere", "granite"])
def test_scaled_and_capped_logits_rank_alike(architecture: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    """What such models do to logits afterwards changes no order."""
    path = copy_of(bundle_of(architecture), tmp_path)
    add_shortlist(path, some_tokens(TINY_VOCAB, 64))
    decoder, short = outputs_of(Bundle.load(path))
    wanted = decoder[contract.LOGITS][..., short[contract.SHORT_IDS]]
    assert (short[contract.SHORT_LOGITS].argmax(-1) == wanted.argmax(-1)).all()


def built_outputs(path: Path, info: EngineInfo, hidden: NDArray[np.float32]) -> tuple[Outputs, NDArray[np.float32]]:
    """The built short list's and the built LM head's, from the same hidden states."""
    folder = engine_folder(Bundle.load(path), "cpu")
    short = Runner(folder / info.graphs[LIST]).run({contract.HIDDEN: hidden})
    return short, Runner(folder / info.graphs[LM_HEAD]).run({contract.HIDDEN: hidden})[contract.LOGITS]


@pytest.mark.parametrize("quantized", [False, True])
def test_a_built_short_list_agrees(quantized: bool, pycode: Bundle, int8_pycode: Bundle, tmp_path: Path) -> None:
    """Whole numbers are multiplied alike in both graphs: what is left is the order of summation."""
    path = copy_of(int8_pycode if quantized else pycode, tmp_path)
    info = add_shortlist(path, some_tokens())
    stored = ir.load(path / info.graph.file).graph.initializers["projection.weight"]
    assert stored.dtype == (ir.DataType.INT8 if quantized else ir.DataType.FLOAT)
    assert (Bundle.load(path).manifest.weights["lm_head"].rotation > 0) == quantized
    decoder, short = outputs_of(Bundle.load(path))
    assert difference(short, decoder[contract.LOGITS]) < 1e-4
    engine = build(path)
    assert engine.differences[LIST].largest < (0.02 if quantized else 1e-5)
    built, logits = built_outputs(path, engine, decoder[contract.HIDDEN])
    assert difference(built, logits) < 1e-4
    lowered = ir.load(engine_folder(Bundle.load(path), "cpu") / engine.graphs[LIST])
    assert any(node.op_type == "MatMulIntegerToFloat" for node in lowered.graph) == quantized


@pytest.mark.parametrize("heads", ["int8", "none"])
def test_quantizing_a_bundle_keeps_its_short_list(heads: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    path, token_ids = copy_of(bundle_of("llama_tied"), tmp_path), some_tokens(TINY_VOCAB, 64)
    add_shortlist(path, token_ids)
    quantize(path, tmp_path / "int8", QuantizeOptions(heads=heads))
    decoder, short = outputs_of(Bundle.load(tmp_path / "int8"))
    assert (short[contract.SHORT_IDS] == np.sort(token_ids)).all()
    logits = decoder[contract.LOGITS]
    assert difference(short, logits) < 0.02 * np.ptp(logits)
    assert LIST in build(tmp_path / "int8").differences


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("replacing", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_an_interrupt_leaves_the_bundle_as_it_was(
    replacing: bool, late: bool, bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_of(bundle_of("llama_tied"), tmp_path)
    if replacing:
        add_shortlist(path, some_tokens(TINY_VOCAB, 32))
    before = contents(path)

    def interrupted(folder: Path, manifest: Manifest) -> None:
        if late:
            write_manifest(folder, manifest)
        raise KeyboardInterrupt

    monkeypatch.setattr(install, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add_shortlist(path, some_tokens(TINY_VOCAB, 64), force=True)
    assert contents(path) == before and not list(tmp_path.glob(".bundle*"))
    Bundle.load(path)


def test_a_short_list_beside_other_heads(pycode: Bundle, tmp_path: Path) -> None:
    path = copy_of(pycode, tmp_path)
    add_shortlist(path, some_tokens(), "mine")
    assert Bundle.load(path).manifest.heads == ("medusa", "mine")
    with pytest.raises(OutputError, match="--force"):
        add_shortlist(path, some_tokens(count=64), "mine")
    assert add_shortlist(path, some_tokens(count=64), "mine", force=True).graph.outputs[1].shape == (64,)
    assert sorted(Bundle.load(path).manifest.heads) == ["medusa", "mine"]


def test_lists_that_cannot_be(bundle_of: BundleOf, tmp_path: Path) -> None:
    path = copy_of(bundle_of("llama_tied"), tmp_path)
    before = contents(path)
    for count in (1, 15, TINY_VOCAB // 2 + 1, TINY_VOCAB):
        with pytest.raises(OptionError, match="from 16 to 150"):
            add_shortlist(path, np.arange(count))
    with pytest.raises(OptionError, match="15 of 300"):
        add_shortlist(path, np.arange(20) % 15)
    for strange in (-1, TINY_VOCAB):
        with pytest.raises(HeadError, match="from 0 to 299"):
            add_shortlist(path, np.array([*range(20), strange]))
    for name in ("none", "a+b", "../x"):
        with pytest.raises(HeadError, match="cannot name a head"):
            add_shortlist(path, np.arange(20), name)
    with pytest.raises(BundleError, match="is not a bundle"):
        add_shortlist(tmp_path, np.arange(20))
    assert contents(path) == before and not list(tmp_path.glob(".bundle*"))


def test_a_target_that_shares_no_lm_head(bundle_of: BundleOf, tmp_path: Path) -> None:
    path = copy_of(bundle_of("llama_tied"), tmp_path)
    write_manifest(path, dataclasses.replace(Bundle.load(path).manifest, weights={}))
    with pytest.raises(HeadError, match="does not show which weight its LM head is"):
        add_shortlist(path, np.arange(20))


def test_the_tokens_are_the_most_used_ones() -> None:
    counts = Counter({7: 5, 3: 5, 9: 8, 2: 1, 250: 1, 400: 50})
    rules = GenerationRules(eos_token_ids=(100, 350))
    assert most_used(counts, 4, TINY_VOCAB, rules).tolist() == [3, 7, 9, 100]
    assert most_used(counts, 9, TINY_VOCAB, rules).tolist() == [0, 1, 2, 3, 4, 7, 9, 100, 250]
    assert coverage(Counter({3: 3, 5: 1}), np.array([3, 9])) == 0.75


def test_tokens_that_tell_times_are_listed() -> None:
    rules = GenerationRules(eos_token_ids=(290,), no_timestamps_token_id=295)
    assert most_used(Counter({7: 5}), 8, TINY_VOCAB, rules).tolist() == [0, 7, 290, 295, 296, 297, 298, 299]


def test_line_breaks_count(pycode: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text file, in whichever pieces it is read."""
    text = "def add(a, b):\n    return a + b\n\n\n" * 200
    (tmp_path / "text.py").write_text(text)
    tokenizer = Tokenizer.load(pycode.path / "tokenizer")
    whole = Counter(tokenizer.encode(text, special=False))
    assert counted(tokenizer, texts_of(tmp_path / "text.py")) == whole
    monkeypatch.setattr(counting, "PIECE", 100)
    pieces = list(texts_of(tmp_path / "text.py"))
    assert "".join(pieces) == text and len(pieces) > 10
    assert any("\n" in tokenizer.decode([token]) for token, count in counted(tokenizer, pieces).items() if count > 100)


def test_texts_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\\ntwo"}\n{"prompt": "three"}\n')
    assert list(texts_of(tmp_path / "a.jsonl")) == ["one\ntwo", "three"]


def test_without_a_text_python_s_own_sources_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(counting, "MOST_CHARACTERS", 300_000)
    texts = list(own_texts())
    assert 50_000 < sum(map(len, texts)) <= 300_000 and any("def " in text for text in texts)
    monkeypatch.setattr(counting.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(OptionError, match="holds no sources"):
        list(own_texts())


def test_a_list_from_a_text_covers_it(pycode: Bundle, tmp_path: Path) -> None:
    path = copy_of(pycode, tmp_path)
    (tmp_path / "text.txt").write_text("".join(own_texts())[:200_000])
    made = make_shortlist(path, tmp_path / "text.txt", 1024)
    assert 0.7 < made.coverage < 1
    short = Runner(path / made.info.graph.file).run({contract.HIDDEN: np.zeros((1, 1, 256), np.float32)})
    assert set(pycode.manifest.generation.eos_token_ids) <= set(short[contract.SHORT_IDS].tolist())


def test_other_devices_leave_it_out(bundle_of: BundleOf, tmp_path: Path) -> None:
    path = copy_of(bundle_of("llama_tied"), tmp_path)
    add_shortlist(path, some_tokens(TINY_VOCAB, 64))
    built = build(path, "cuda")
    assert LIST not in built.graphs and LM_HEAD not in built.graphs and LIST not in built.differences
    assert {LIST, LM_HEAD} <= build(path).graphs.keys()


def test_an_lm_head_that_reads_more_stays_where_it_is(bundle_of: BundleOf) -> None:
    """Logits that depend on a token, say, cannot be computed later from hidden states."""
    model = canonical.load_graph(bundle_of("llama_tied"), "decoder")
    logits = next(value for value in model.graph.outputs if value.name == contract.LOGITS)
    ids = next(value for value in model.graph.inputs if value.name == contract.INPUT_IDS)
    writer = Writer(model, None)
    moved = writer.node("Add", [logits, writer.node("Cast", [ids], to=ir.DataType.FLOAT)])
    moved.shape, moved.dtype = logits.shape, logits.dtype
    logits.name, moved.name = "unmoved", contract.LOGITS
    model.graph.outputs[list(model.graph.outputs).index(logits)] = moved
    with pytest.raises(EngineError, match="reads more than the hidden states"):
        lm_head_of(model)

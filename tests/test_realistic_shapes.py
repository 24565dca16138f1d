"""Every architecture in the shapes of published checkpoints, from export through quantize, build and tune to generate."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from architectures import ENCODER_DECODERS, byte_tokenizer, save_checkpoint
from numpy.typing import NDArray
from realistic import REALISTIC, VOCAB, WINDOW, realistic_model

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.calibration.tune import TuneOptions, tune
from headstart.exporter.build import build
from headstart.exporter.export import export
from headstart.exporter.golden import decoder_start, reference_greedy
from headstart.exporter.seq2seq import encoder_input, feature_shape
from headstart.runtime.loading import load
from headstart.runtime.model import Model

TEXT = "the quick brown fox and the quick brown dog, the quick"  # a token for each byte: longer than the window
TOKENS = 20
INV_FREQ_256 = ("llama", "gemma2", "gemma3", "t5gemma")
TUNED = ("gemma3", "flan_t5")


@dataclass(frozen=True)
class Family:
    """One architecture: its checkpoint in memory, what it reads, and its bundles by weights, built for the CPU."""

    name: str
    model: Any
    source: NDArray[Any] | None
    bundles: dict[str, Path]
    differences: dict[str, float]

    @property
    def prompt(self) -> dict[str, Any]:
        """As `generate` takes it."""
        audio = self.source is not None and self.source.dtype == np.float32
        return {"features": self.source} if audio else {"prompt": TEXT}

    def generate(self, model: Model, drafter: str) -> Any:
        return model.generate(**self.prompt, max_new_tokens=TOKENS, drafter=drafter, ignore_end=True)


def source_of(name: str, model: Any) -> NDArray[Any] | None:
    if name not in ENCODER_DECODERS:
        return None
    kind = encoder_input(model)
    if kind == "input_ids":
        return np.array(byte_tokenizer(VOCAB)(TEXT)["input_ids"])
    shape = feature_shape(model, {"input_values": 16000, "input_features": 600}[kind])
    return (0.5 * np.random.default_rng(1).standard_normal(shape)).astype(np.float32)


@pytest.fixture(scope="module", params=REALISTIC)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    """Built once for all tests of a family, and removed after them: they are 200 MB each."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = realistic_model(name)
    save_checkpoint(model, folder / "checkpoint")
    export(folder / "checkpoint", folder / "float32")
    quantize(folder / "float32", folder / "int8", QuantizeOptions(weights="int8"))
    bundles = {weights: folder / weights for weights in ("float32", "int8")}
    differences = {weights: build(bundle).relative_difference for weights, bundle in bundles.items()}
    yield Family(name, model, source_of(name, model), bundles, differences)
    shutil.rmtree(folder)


def test_both_builds_compute_what_the_canonical_graphs_do(family: Family) -> None:
    assert family.differences["float32"] < 5e-5  # random layers with a gain of 3 to 8 amplify the order of summation
    assert family.differences["int8"] > 1e-6  # and rounding, which `build` has bounded: integers were multiplied at all


def test_greedy_tokens_equal_transformers_generate(family: Family) -> None:
    """Of the float bundle; the prompt is longer than the windows, where there are any."""
    if family.source is None:
        prompt, source = np.array([byte_tokenizer(VOCAB)(TEXT)["input_ids"]]), None
        assert prompt.shape[1] > WINDOW
    else:
        prompt, source = np.array([[decoder_start(family.model)]]), family.source[None]
    wanted = reference_greedy(family.model, prompt, TOKENS, source)[0].tolist()
    assert len(set(wanted)) > 2, "what repeats itself proves little"
    assert family.generate(load(family.bundles["float32"]), "none").token_ids == wanted


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_drafting_changes_nothing(weights: str, family: Family) -> None:
    """A random model rarely repeats its prompt, so n-grams rarely draft; as its own draft model it is always right."""
    model = load(family.bundles[weights], draft_model=family.bundles[weights])
    plain = family.generate(model, "none").token_ids
    ngram, itself = family.generate(model, "ngram"), family.generate(model, "draft_model")
    assert ngram.token_ids == plain and itself.token_ids == plain
    assert itself.stats.verify_calls < TOKENS / 2


@pytest.mark.parametrize("family", INV_FREQ_256, indirect=True)
def test_large_inverse_frequencies_lie_in_the_data_file(family: Family) -> None:
    """Those of heads of 256: 128 frequencies are stored with the weights, where smaller ones are stored in the graph."""
    weights = ir.load(family.bundles["float32"] / "graphs/decoder.onnx").graph.initializers
    stored = [value.const_value for name, value in weights.items() if "inv_freq" in name]
    assert stored and all(isinstance(tensor, ir.ExternalTensor) and tensor.nbytes == 512 for tensor in stored)


@pytest.mark.parametrize("family", TUNED, indirect=True)  # tuning reads only what the other tests check of every family
def test_tuned_decoding_changes_nothing(family: Family) -> None:
    tune(family.bundles["int8"], [TEXT, TEXT[::-1]], options=TuneOptions(max_new_tokens=TOKENS))
    model = load(family.bundles["int8"])
    plain = family.generate(model, "none").token_ids
    assert all(family.generate(model, drafter).token_ids == plain for drafter in (*model.drafters, "auto"))

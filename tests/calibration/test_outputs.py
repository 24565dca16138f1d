"""Training data for heads of encoder-decoders: the base's own outputs, aligned with the states that read them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from headstart.calibration.distill import IGNORED, DistillOptions, HiddenData
from headstart.calibration.outputs import distill_outputs, ended, text_inputs, write
from headstart.calibration.train import TrainOptions, train_heads, train_on
from headstart.exporter.heads.families import recognise
from headstart.exporter.heads.install import import_head
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import OptionError
from headstart.runtime.loading import load
from tests.architectures import byte_tokenizer

SMALL = DistillOptions(new_tokens=12, sequences=10, batch=4)


def tiny(kind: str) -> Any:
    """Random weights, large enough that outputs vary with the source."""
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        config = T5Config(**sizes, decoder_start_token_id=0, initializer_factor=3.0)
        return T5ForConditionalGeneration(config).eval()
    config = BartConfig(
        vocab_size=300,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=16,
        init_std=1.0,
        forced_eos_token_id=None,
        tie_word_embeddings=False,
    )
    return BartForConditionalGeneration(config).eval()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    file = tmp_path / "sources.txt"
    file.write_text("".join(f"{chr(97 + i) * (1 + i)} of {i} words\n" for i in range(14)))
    return file


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_states_are_those_that_say_the_next_token(kind: str, sources: Path) -> None:
    """The LM head over each recorded state gives the next token of the output: greedy, and nothing is shifted."""
    model = tiny(kind)
    data = distill_outputs(model, text_inputs(model, tokenizer(), [sources], SMALL, seed=0), SMALL, lambda *_: None)
    assert len(data) == SMALL.sequences
    said = (data.hidden.float() @ model.get_output_embeddings().weight.T).argmax(-1)[:, :-1]
    given = data.token_ids[:, 1:]
    agree = (said == given)[given != IGNORED].float().mean()
    assert agree > 0.98  # the states are kept in float16
    assert any(len(set(row)) > 2 for row in given.tolist())  # a shift would show


def tokenizer() -> Any:
    made = byte_tokenizer(300)
    made.pad_token = made.pad_token or made.eos_token
    return made


def test_tokens_behind_the_end_are_ignored() -> None:
    token_ids = torch.tensor([[2, 5, 2, 0, 0], [2, 6, 7, 8, 9], [2, 3, 4, 2, 2]])
    ignored = IGNORED
    wanted = [[2, 5, 2, ignored, ignored], [2, 6, 7, 8, 9], [2, 3, 4, 2, ignored]]
    assert ended(token_ids, [2]).tolist() == wanted
    assert ended(token_ids, []).tolist() == token_ids.tolist()


def test_outputs_stay_within_the_positions_the_model_has(sources: Path) -> None:
    model = tiny("bart")
    inputs = text_inputs(model, tokenizer(), [sources], SMALL, seed=0)
    assert inputs[0]["input_ids"].shape[1] == 16
    assert write(model, inputs[0], 500).shape[1] <= 16


def test_sources_are_lines_or_json_objects(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "three"}) + "\n")
    model, made = tiny("t5"), tokenizer()
    batches = text_inputs(model, made, [tmp_path / "a.txt", tmp_path / "b.jsonl"], DistillOptions(sequences=9, batch=9), seed=0)
    assert sorted(made.batch_decode(batches[0]["input_ids"], skip_special_tokens=True)) == ["one", "three", "two"]
    assert batches[0]["attention_mask"].sum(1).tolist() == sorted(batches[0]["attention_mask"].sum(1).tolist())
    with pytest.raises(OptionError, match="No training files"):
        text_inputs(model, made, [], SMALL, seed=0)


def test_heads_learn_from_outputs_of_unlike_length(tmp_path: Path) -> None:
    """Two outputs, told apart by the state: the head finds the token after the next, and padding teaches it nothing."""
    model = tiny("t5")
    rows = torch.tensor([[0, 5, 6, 7, 8, 1], [0, 9, 10, 1, IGNORED, IGNORED]]).repeat(20, 1)
    hidden = torch.randn(2, 6, 32).repeat(20, 1, 1)
    options = TrainOptions(heads=1, epochs=60, batch_tokens=60, learning_rate=1e-2, held_out=0.2)
    folder = tmp_path / "heads"
    folder.mkdir()
    report = train_on(model, HiddenData(rows, hidden.half()), folder, "tiny", options, lambda *_: None)
    assert report["held_out_accuracy"][0][0] == 1.0
    assert report["training_tokens"] + report["held_out_tokens"] == int((rows != IGNORED).sum())
    assert recognise(folder).dialect == "medusa-1"


def test_outputs_too_short_for_the_heads(tmp_path: Path) -> None:
    data = HiddenData(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3, 32).half())
    with pytest.raises(OptionError, match="at least 6 tokens, the base's outputs have 3"):
        train_on(tiny("t5"), data, tmp_path, "tiny", TrainOptions(heads=4), lambda *_: None)


def test_from_checkpoint_to_lossless_decoding(
    sources: Path, tmp_path: Path, checkpoint_of: Callable[[str], Path], bundle_of: Callable[[str], Bundle]
) -> None:
    options = TrainOptions(heads=2, own_projection=False, epochs=2, held_out=0.2, distill=SMALL)
    train_heads(checkpoint_of("flan_t5"), [sources], tmp_path / "heads", options)
    bundle = Path(shutil.copytree(bundle_of("flan_t5").path, tmp_path / "bundle"))
    assert import_head(bundle, tmp_path / "heads").heads == 2
    model = load(bundle)
    plain = model.generate("a source", max_new_tokens=16, drafter="none").token_ids
    assert model.generate("a source", max_new_tokens=16, drafter="medusa").token_ids == plain

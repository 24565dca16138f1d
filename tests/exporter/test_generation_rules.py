"""generation_config: what the runtime applies is carried over, and what it does not apply is said at export."""

from pathlib import Path

import pytest
from architectures import save_checkpoint, tiny_model

from headstart.exporter.export import export
from headstart.exporter.generation_rules import NOT_APPLIED, generation_rules, notes, one_token
from headstart.runtime.errors import CheckpointError

VALUES = {"sequence_bias": [[[55], 50.0]], "exponential_decay_length_penalty": [3, 2.0], "guidance_scale": 1.5}


@pytest.mark.parametrize("name", NOT_APPLIED)
def test_each_setting_that_is_not_applied_is_named(name: str) -> None:
    model = tiny_model("llama")
    assert notes(model) == ()
    setattr(model.generation_config, name, VALUES.get(name, 0.5))
    assert len(notes(model)) == 1 and name in notes(model)[0]


def test_the_bundle_keeps_the_notes_and_the_rules(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for name, value in {**VALUES, "repetition_penalty": 1.3, "max_new_tokens": 5, "max_length": 20}.items():
        setattr(model.generation_config, name, value)
    said: list[str] = []
    manifest = export(save_checkpoint(model, tmp_path / "c"), tmp_path / "b", progress=said.append).manifest
    rules = manifest.generation
    assert (rules.repetition_penalty, rules.max_new_tokens, rules.max_length) == (1.3, 5, 20)
    assert len(manifest.provenance.notes) == len(VALUES) and set(manifest.provenance.notes) <= set(said)


def test_sampling_that_a_user_has_to_ask_for() -> None:
    model = tiny_model("llama")
    model.generation_config.do_sample, model.generation_config.temperature, model.generation_config.top_k = True, 0.6, 20
    assert "--temperature 0.6 --top-k 20" in notes(model)[0]
    assert generation_rules(model, 300).repetition_penalty == 1.0


def test_one_start_token() -> None:
    assert (one_token([7, 7]), one_token(7), one_token(None)) == (7, 7, None)
    with pytest.raises(CheckpointError, match="decoder_start_token_id"):
        one_token([7, 8])

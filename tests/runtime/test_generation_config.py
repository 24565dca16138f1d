"""What a checkpoint's generation_config demands is kept, by plain decoding and by whatever is drafted."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from architectures import save_checkpoint, tiny_model
from transformers import DynamicCache, EncoderDecoderCache

from headstart.exporter.export import export
from headstart.runtime.errors import OptionError, PromptError
from headstart.runtime.loading import load
from headstart.runtime.model import Model

TEXTS = ["abcab cab", "What is said twice is said twice.", "7 of 9"]


def configured(name: str, **settings: Any) -> Any:
    model = tiny_model(name)
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    return model


def ids_of(model: Model, text: str) -> list[int]:
    return model.tokenizer.encode(text)


def reference(model: Any, source: Sequence[int], **options: Any) -> list[int]:
    """New tokens of transformers' generate; the decoder's start token is not one."""
    source_ids = torch.tensor([source])
    # generate() would make a cache of as many layers as some encoders have, whatever the decoder has.
    caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
    found = model.generate(source_ids, attention_mask=torch.ones_like(source_ids), past_key_values=caches, **options)
    token_ids: list[int] = found[0, 1:].tolist()
    return token_ids


SETTINGS: dict[str, dict[str, Any]] = {
    "bart": {
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
        "min_length": 8,
        "no_repeat_ngram_size": 2,
        "encoder_no_repeat_ngram_size": 3,
        "begin_suppress_tokens": [40, 41],
        "suppress_tokens": [77, 78],
        "num_beams": 5,
        "early_stopping": True,
        "length_penalty": 0.6,
    },
    "marian": {"forced_eos_token_id": 2, "bad_words_ids": [[1], [50, 60]], "renormalize_logits": True, "num_beams": 4},
    "t5": {"min_new_tokens": 5, "suppress_tokens": [100, 101], "num_beams": 3, "early_stopping": "never"},
}


@pytest.fixture(scope="module", params=SETTINGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    """(the checkpoint in transformers, its bundle)."""
    folder = tmp_path_factory.mktemp(request.param)
    reference_model = configured(request.param, **SETTINGS[request.param])
    export(save_checkpoint(reference_model, folder / "checkpoint"), folder / "bundle", max_cache=64)
    return reference_model, load(folder / "bundle", threads=1)


@pytest.mark.parametrize("drafter", ["none", "ngram", "source_copy"])
def test_greedy_text_is_that_of_transformers(drafter: str, pair: tuple[Any, Model]) -> None:
    checkpoint, model = pair
    results = model.generate(TEXTS, max_new_tokens=24, drafter=drafter)
    for text, result in zip(TEXTS, results, strict=True):
        assert result.token_ids == reference(checkpoint, ids_of(model, text), max_new_tokens=24, do_sample=False, num_beams=1)


def test_a_hypothesis_is_drafted_and_changes_nothing(pair: tuple[Any, Model]) -> None:
    _, model = pair
    plain = model.generate(TEXTS, max_new_tokens=24, drafter="none")
    hypotheses = [[*result.token_ids[:8], 299, *result.token_ids[9:]] for result in plain]
    drafted = model.generate(TEXTS, max_new_tokens=24, hypotheses=hypotheses)
    assert [result.token_ids for result in drafted] == [result.token_ids for result in plain]
    assert all(result.stats.drafter == "previous_hypothesis" for result in drafted)
    calls = [(now.stats.verify_calls, before.stats.verify_calls) for now, before in zip(drafted, plain, strict=True)]
    assert all(now < before / 2 for now, before in calls)
    with pytest.raises(OptionError, match="one hypothesis for each of the 3 prompts, got 1"):
        model.generate(TEXTS, hypotheses=hypotheses[:1])


def test_beams_are_those_of_transformers(pair: tuple[Any, Model]) -> None:
    """With what the checkpoint says of beams, and with what the user says."""
    checkpoint, model = pair
    for settings in ({}, {"num_beams": 2, "length_penalty": 1.5, "early_stopping": False}):
        for text in TEXTS:
            best = model.beam_search(text, max_new_tokens=24, **settings)[0]
            wanted = reference(checkpoint, ids_of(model, text), max_new_tokens=24, do_sample=False, **settings)
            assert best.token_ids == wanted and best.text == model.tokenizer.decode(wanted)
    assert len(model.beam_search(TEXTS[0])) == checkpoint.generation_config.num_beams
    with pytest.raises(PromptError, match="empty"):
        model.beam_search("")
    with pytest.raises(OptionError, match="num_beams"):
        model.beam_search(TEXTS[0], num_beams=0)

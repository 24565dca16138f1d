"""Beam search against transformers' generate, and against the exhaustive search that a full beam is."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_model

from headstart.runtime.beam import BeamOptions, Beams, beam_search
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import OptionError
from headstart.runtime.rules import TokenRules
from headstart.runtime.sampling import SamplingOptions

PROMPT = [5, 9, 17, 30, 5, 9]
PROMPTS = [np.random.default_rng(seed).integers(3, 300, 6).tolist() for seed in range(4)]


@pytest.fixture(scope="module")
def engine(bundle_of: Callable[[str], Bundle]) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle_of("llama"))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def ends_on_the_way(engine: OnnxRuntimeEngine, prompt: list[int]) -> frozenset[int]:
    """Two tokens that beams meet: a random model would hardly ever end by itself."""
    best, *_, last = beam_search(engine, prompt, BeamOptions(max_new_tokens=10))
    return frozenset({best.token_ids[6], last.token_ids[3]})


def reference(model: Any, prompt: list[int], ends: frozenset[int], **options: Any) -> list[tuple[list[int], float]]:
    """(new tokens, score) of every returned beam."""
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=0,
        num_return_sequences=options["num_beams"],
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return [
        (without_padding(sequence[len(prompt) :].tolist(), ends), float(score))
        for sequence, score in zip(found.sequences, found.sequences_scores, strict=True)
    ]


def without_padding(token_ids: list[int], ends: frozenset[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(token_ids) if token in ends), len(token_ids))
    return token_ids[:end]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"num_beams": 7},
    "long": {"length_penalty": 2.0},
    "short": {"length_penalty": -1.0},
    "early": {"early_stopping": True},
    "never": {"early_stopping": "never"},
    "never, long": {"early_stopping": "never", "length_penalty": 1.5},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_beams_are_those_of_transformers(setting: str, engine: OnnxRuntimeEngine, model: Any) -> None:
    options = {"num_beams": 4, "max_new_tokens": 14} | SETTINGS[setting]
    lengths = set()
    for prompt in PROMPTS:
        ends = ends_on_the_way(engine, prompt)
        ours = beam_search(engine, prompt, BeamOptions(end_tokens=ends, **options))
        theirs = reference(model, prompt, ends, **options)
        assert [h.token_ids for h in ours] == [tokens for tokens, _ in theirs]
        np.testing.assert_allclose([h.score for h in ours], [score for _, score in theirs], rtol=1e-4)
        lengths |= {len(h.token_ids) for h in ours}
    if options.get("length_penalty", 1.0) <= 1:  # beyond, the longest wins
        assert len(lengths) > 2, "texts ended at several lengths"


def test_one_beam_is_greedy_decoding(engine: OnnxRuntimeEngine, model: Any) -> None:
    for prompt in PROMPTS:
        ends = ends_on_the_way(engine, prompt)
        plain = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=14, eos_token_id=sorted(ends))
        found = beam_search(engine, prompt, BeamOptions(num_beams=1, max_new_tokens=14, end_tokens=ends))
        assert [h.token_ids for h in found] == [plain[0, len(prompt) :].tolist()]


def test_rules_hold_in_every_beam(engine: OnnxRuntimeEngine, model: Any) -> None:
    ends = ends_on_the_way(engine, PROMPT)
    plain = beam_search(engine, PROMPT, BeamOptions(max_new_tokens=10))[0].token_ids
    rules = TokenRules(forced_eos_token_ids=(2,), min_new_tokens=6, forbidden_sequences=((plain[1],), tuple(plain[3:5])))
    sampling = SamplingOptions(no_repeat_ngram=2)
    options = BeamOptions(renormalize=True, max_new_tokens=14, sampling=sampling, end_tokens=ends, rules=rules)
    ours = beam_search(engine, PROMPT, options)
    theirs = reference(
        model,
        PROMPT,
        ends,
        num_beams=4,
        max_new_tokens=14,
        renormalize_logits=True,
        forced_eos_token_id=2,
        min_new_tokens=6,
        bad_words_ids=[list(sequence) for sequence in rules.forbidden_sequences],
        no_repeat_ngram_size=2,
    )
    assert [h.token_ids for h in ours] == [tokens for tokens, _ in theirs]
    np.testing.assert_allclose([h.score for h in ours], [score for _, score in theirs], rtol=1e-4)


def test_a_full_beam_is_an_exhaustive_search() -> None:
    """Three tokens, one of them the end: with as many beams as there are texts, the best of all texts is found."""
    table = {
        path: np.log(np.random.default_rng([*path, 9]).dirichlet(np.ones(3)))
        for length in range(4)
        for path in product(range(2), repeat=length)
    }
    beams = Beams(BeamOptions(num_beams=16, end_tokens=frozenset({2}), early_stopping="never", length_penalty=0.0), 4)
    while not beams.done:
        beams.advance(np.stack([table[tuple(output)] for output in beams.outputs]))
    texts = [(*path, 2) for length in range(4) for path in product(range(2), repeat=length)]
    texts += list(product(range(2), repeat=4))
    scores = sorted((sum(float(table[text[:i]][token]) for i, token in enumerate(text)) for text in texts), reverse=True)
    np.testing.assert_allclose([h.score for h in beams.finished], scores[:16])


def test_the_cache_s_end_finishes_all_beams(engine: OnnxRuntimeEngine) -> None:
    prompt = np.random.default_rng(0).integers(3, 300, 250).tolist()
    found = beam_search(engine, prompt, BeamOptions(num_beams=3, max_new_tokens=50))
    assert [len(h.token_ids) for h in found] == [6, 6, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"early_stopping": "sometimes"}, "early_stopping"),
        ({"sampling": SamplingOptions(temperature=1.0)}, "temperature"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BeamOptions(**options)

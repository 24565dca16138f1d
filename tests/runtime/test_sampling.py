"""Logit rules and warpers against transformers' own processors, and the options they refuse."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as reference

from headstart.runtime.errors import EngineError, OptionError
from headstart.runtime.sampling import LogitRules, SamplingOptions, kth_best

CONTEXT = [3, 7, 7, 1, 3, 7, 9, 3]

CASES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "temperature": ({"temperature": 0.6}, [reference.TemperatureLogitsWarper(0.6)]),
    "top_k": ({"temperature": 1.0, "top_k": 4}, [reference.TopKLogitsWarper(4)]),
    "top_p": ({"temperature": 1.0, "top_p": 0.6}, [reference.TopPLogitsWarper(0.6)]),
    "min_p": ({"temperature": 1.0, "min_p": 0.2}, [reference.MinPLogitsWarper(0.2)]),
    "penalty": ({"temperature": 1.0, "repetition_penalty": 1.4}, [reference.RepetitionPenaltyLogitsProcessor(1.4)]),
    "no_repeat": ({"temperature": 1.0, "no_repeat_ngram": 2}, [reference.NoRepeatNGramLogitsProcessor(2)]),
    "suppress": ({"temperature": 1.0, "suppress_tokens": (2, 5)}, [reference.SuppressTokensLogitsProcessor([2, 5])]),
    "all": (
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "no_repeat_ngram": 3},
        [
            reference.RepetitionPenaltyLogitsProcessor(1.2),
            reference.NoRepeatNGramLogitsProcessor(3),
            reference.TemperatureLogitsWarper(0.8),
            reference.TopKLogitsWarper(9),
            reference.TopPLogitsWarper(0.9),
            reference.MinPLogitsWarper(0.05),
        ],
    ),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("case", CASES)
def test_probabilities_are_those_of_transformers(case: str, seed: int) -> None:
    options, processors = CASES[case]
    logits = (np.random.default_rng(seed).standard_normal(12) * 3).astype(np.float32)
    scores = torch.from_numpy(logits.copy())[None].double()
    for processor in processors:
        scores = processor(torch.tensor([CONTEXT]), scores)
    ours = LogitRules(SamplingOptions(**options)).start(CONTEXT).probabilities(logits)
    np.testing.assert_allclose(ours, torch.softmax(scores, -1)[0].numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [1003, 262_144])
@pytest.mark.parametrize("spread", [0.1, 3.0, 12.0])
@pytest.mark.parametrize(
    "options", [{"top_k": 50}, {"top_k": 1000}, {"top_p": 0.95}, {"top_p": 0.01}, {"top_k": 20, "top_p": 0.5}]
)
def test_large_vocabularies(size: int, spread: float, options: dict[str, Any]) -> None:
    """Flat and peaked, with ties: only few tokens are sorted, and the same ones are kept."""
    logits = np.round(np.random.default_rng(0).standard_normal(size) * spread, 2).astype(np.float32)
    scores = torch.from_numpy(logits.copy())[None].double()
    if "top_k" in options:
        scores = reference.TopKLogitsWarper(options["top_k"])(torch.tensor([CONTEXT]), scores)
    if "top_p" in options:
        scores = reference.TopPLogitsWarper(options["top_p"])(torch.tensor([CONTEXT]), scores)
    ours = LogitRules(SamplingOptions(temperature=1.0, **options)).start(CONTEXT).probabilities(logits)
    wanted = torch.softmax(scores, -1)[0].numpy()
    assert abs(np.count_nonzero(ours) - np.count_nonzero(wanted)) <= 1  # of equal tokens at the edge, by rounding
    np.testing.assert_allclose(np.sort(ours), np.sort(wanted), atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.9}]
)
def test_nan_is_one_clear_error(options: dict[str, Any]) -> None:
    logits = np.zeros(2000, np.float32)
    logits[::7] = np.nan
    with pytest.raises(EngineError, match=r"After 8 tokens the model's logits hold NaN"):
        LogitRules(SamplingOptions(**options)).start(CONTEXT).probabilities(logits)


def test_the_kth_best_of_nan_is_nan() -> None:
    """Log-probabilities ask for it, too: one bad row must not end the requests next to it."""
    assert np.isnan(kth_best(np.full(2000, np.nan, np.float32), 5))


def test_logits_are_never_written_into() -> None:
    logits = np.arange(12, dtype=np.float32)
    options = SamplingOptions(temperature=0.5, top_k=3, repetition_penalty=2.0, no_repeat_ngram=2, suppress_tokens=(1,))
    state = LogitRules(options).start(CONTEXT)
    state.probabilities(logits)
    state.process(logits)
    assert logits.tolist() == list(range(12))


def test_greedy_probabilities_are_one_hot_after_the_rules() -> None:
    state = LogitRules(SamplingOptions(suppress_tokens=(11,))).start([])
    assert state.probabilities(np.arange(12, dtype=np.float32)).argmax() == 10


def test_no_repeat_in_a_short_text_forbids_nothing() -> None:
    state = LogitRules(SamplingOptions(no_repeat_ngram=4)).start([1, 2])
    assert np.isfinite(state.process(np.zeros(12, np.float32))).all()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"no_repeat_ngram": -2},
        {"seed": -1},
    ],
)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        SamplingOptions(**options)

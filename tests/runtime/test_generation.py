"""Several callers of one model: threads, interleaved streams, mistakes; each gets what it would get alone."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import OptionError, PromptError
from headstart.runtime.loading import load
from headstart.runtime.model import Model

BundleOf = Callable[[str], Bundle]
PROMPTS = ["def f(x):", "import os\nimport", "abcabcabcabc", "x = [1, 2, 3]"]
SETTINGS: tuple[dict[str, Any], ...] = (
    {"drafter": "none"},
    {"drafter": "ngram"},
    {"drafter": "draft_model", "draft_nodes": 3},
    {"drafter": "draft_model", "temperature": 0.9, "seed": 4},
    {"drafter": "ngram", "temperature": 0.9, "seed": 4},
    {"drafter": "auto"},
)


@pytest.fixture(scope="module")
def model(bundle_of: BundleOf) -> Model:
    return load(bundle_of("llama").path, threads=1, draft_model=bundle_of("qwen2").path)


def alone(model: Model, prompt: str, options: dict[str, Any]) -> list[int]:
    return model.generate(prompt, max_new_tokens=30, ignore_end=True, **options).token_ids


def test_threads_get_what_they_would_get_alone(model: Model) -> None:
    jobs = [(prompt, options) for options in SETTINGS for prompt in PROMPTS]
    wanted = [alone(model, *job) for job in jobs]
    barrier = threading.Barrier(8)

    def run(job: tuple[str, dict[str, Any]]) -> list[int]:
        barrier.wait()
        return alone(model, *job)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, jobs)) == wanted


def test_interleaved_streams_get_what_they_would_get_alone(model: Model) -> None:
    jobs = [(prompt, options) for options in SETTINGS[1:5] for prompt in PROMPTS[:2]]
    wanted = [model.generate(p, max_new_tokens=30, ignore_end=True, **o).text for p, o in jobs]
    streams = [model.stream(prompt, max_new_tokens=30, ignore_end=True, **options) for prompt, options in jobs]
    texts, open_streams = ["" for _ in jobs], set(range(len(jobs)))
    while open_streams:
        for i in list(open_streams):
            piece = next(streams[i], None)
            if piece is None:
                open_streams.remove(i)
            else:
                texts[i] += piece
    assert texts == wanted


def test_an_abandoned_stream_leaves_nothing_behind(model: Model) -> None:
    wanted = alone(model, PROMPTS[0], SETTINGS[2])
    stream = model.stream(PROMPTS[1], max_new_tokens=100, ignore_end=True, **SETTINGS[2])
    next(stream)
    stream.close()
    assert model.scheduler.idle
    assert alone(model, PROMPTS[0], SETTINGS[2]) == wanted


def test_a_mistake_in_one_prompt_queues_none_of_them(model: Model) -> None:
    with pytest.raises(PromptError, match="tokens"):
        model.generate([PROMPTS[0], "x" * 1000])
    with pytest.raises(PromptError, match="empty"):
        model.generate([PROMPTS[0], ""])
    assert model.scheduler.idle


def test_options_are_checked_by_name_and_value(model: Model) -> None:
    with pytest.raises(OptionError, match=r"unknown option 'max_tokens'.*max_new_tokens"):
        model.generate(PROMPTS[0], max_tokens=3)  # type: ignore[call-overload]
    with pytest.raises(OptionError, match="drafter 'medusa' is unknown"):
        model.generate(PROMPTS[0], drafter="medusa")
    with pytest.raises(OptionError, match="logprobs"):
        model.generate(PROMPTS[0], logprobs=-1)
    with pytest.raises(OptionError, match="--lossy"):
        model.generate(PROMPTS[0], acceptance="typical")
    with pytest.raises(OptionError, match=r"nonsense.*greedy.*block"):
        model.generate(PROMPTS[0], acceptance="nonsense")


class OnlyEvenTokens:
    """A caller's own logit rule, without memory."""

    def start(self, prompt: Sequence[int]) -> "OnlyEvenTokens":
        return self

    def advance(self, token: int) -> None: ...

    def fork(self) -> "OnlyEvenTokens":
        return self

    def mask(self, logits: NDArray[np.float32]) -> None:
        logits[1::2] = -np.inf

    def forbids(self, token: int) -> bool:
        return token % 2 == 1


@pytest.mark.parametrize("options", SETTINGS)
def test_a_rule_of_the_caller_holds_with_every_drafter(model: Model, options: dict[str, Any]) -> None:
    free = alone(model, PROMPTS[0], options)
    found = alone(model, PROMPTS[0], {**options, "logit_rules": [OnlyEvenTokens()]})
    assert not any(token % 2 for token in found) and any(token % 2 for token in free)
    if not options.get("temperature"):
        assert found == alone(model, PROMPTS[0], {"drafter": "none", "logit_rules": [OnlyEvenTokens()]})


def test_a_seed_repeats_and_rows_of_a_batch_share_no_draws(model: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "ignore_end": True, "drafter": "none"}
    five = [r.token_ids for r in model.generate([PROMPTS[0]] * 3, seed=5, **options)]
    six = [r.token_ids for r in model.generate([PROMPTS[0]] * 3, seed=6, **options)]
    assert five == [r.token_ids for r in model.generate([PROMPTS[0]] * 3, seed=5, **options)]
    texts = [tuple(ids) for ids in five + six]
    assert len(set(texts)) == len(texts), "the second row of seed 5 is not the first of seed 6"


def test_untuned_auto_drafts_only_once_it_has_shown_that_it_pays(model: Model) -> None:
    """Text drawn at random is not repetitive, so nothing should ever be verified for it."""
    result = model.generate(PROMPTS[3], max_new_tokens=24, drafter="auto", temperature=20.0, seed=1, ignore_end=True)
    assert result.stats.drafted_tokens == 0


def test_log_probabilities_come_with_each_token(model: Model) -> None:
    result = model.generate(PROMPTS[0], max_new_tokens=12, logprobs=2, drafter="ngram", ignore_end=True)
    assert [entry.token_id for entry in result.log_probs] == result.token_ids
    assert all(entry.top[0] == (entry.token_id, entry.log_prob) for entry in result.log_probs), "greedy takes the best"

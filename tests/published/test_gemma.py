"""Gemma 3 270M: a vocabulary of 262,144, tied; head size 256; windows; channels a hundred times as large as the others."""

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from published_bundles import Bundles

from headstart.calibration.report import compare
from headstart.calibration.verify import verify
from headstart.exporter.checkpoint import load_checkpoint
from headstart.exporter.golden import reference_greedy
from headstart.runtime.loading import load

pytestmark = pytest.mark.published
PROMPTS = Path(__file__).parents[2] / "samples/published/prompts.jsonl"


@pytest.fixture(scope="module")
def gemma(bundles_of: Callable[[str], Bundles]) -> Bundles:
    return bundles_of("gemma-3-270m")


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, str]]:
    return [json.loads(line) for line in PROMPTS.read_text("utf-8").splitlines()]


def test_greedy_text_is_that_of_transformers(gemma: Bundles, prompts: list[dict[str, str]]) -> None:
    model, checkpoint = load(gemma.float32), load_checkpoint(gemma.checkpoint)
    for one in prompts[:3]:
        ids = model.tokenizer.encode(one["prompt"])
        wanted = reference_greedy(checkpoint.model, np.array([ids]), 16)[0].tolist()
        assert model.generate(one["prompt"], max_new_tokens=16, drafter="none", ignore_end=True).token_ids == wanted


def test_int8_keeps_the_quality(gemma: Bundles, tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    text.write_text("\n".join(topics[name] for name in sorted(topics)[::2]), "utf-8")
    float32, int8 = compare([gemma.float32, gemma.int8], text, max_tokens=1024).schemes
    assert int8.perplexity < 1.015 * float32.perplexity  # 1.006 over 8,192 tokens; without the rotation 1.045
    assert int8.kl < 0.008 and int8.agreement > 0.94  # without: 0.05 and 88 %
    assert int8.disk_mb < 0.28 * float32.disk_mb


def test_nothing_is_found_by_verify(gemma: Bundles, prompts: list[dict[str, str]]) -> None:
    report = verify(gemma.int8, [one["prompt"] for one in prompts[:2]], 24, samples=50)
    assert report.ok, report


def test_drafts_change_no_token(gemma: Bundles, prompts: list[dict[str, str]]) -> None:
    model = load(gemma.int8)
    copies: list[Any] = [one["prompt"] for one in prompts if one["class"] == "copy"]
    options = {"max_new_tokens": 24, "ignore_end": True}
    plain, drafted = ([model.generate(one, drafter=d, **options) for one in copies] for d in ("none", "ngram"))
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    assert sum(one.stats.verify_calls for one in drafted) < 0.7 * sum(one.stats.verify_calls for one in plain)

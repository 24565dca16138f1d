"""Tuning: what the recorder counts, what is written and chosen, and that a tuning of another engine is refused."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drafting import draft_request

from headstart.calibration.bench import bench, draw
from headstart.calibration.tune import PRIOR_WEIGHT, Recorder, TuneOptions, drafter_pairs, node_cost, tune
from headstart.exporter.build import build
from headstart.runtime.bundle import Bundle
from headstart.runtime.drafters.base import DraftRequest, DraftSequence
from headstart.runtime.errors import EngineError, OptionError, OutputError
from headstart.runtime.loading import load
from headstart.runtime.model import Model
from headstart.runtime.prompts import read_prompt_classes
from headstart.runtime.tree import ROOT, DraftTree
from headstart.runtime.tuning import DrafterTuning, tuning_file
from headstart.runtime.verify_cost import VerifyCost

BundleOf = Callable[[str], Bundle]
PROMPTS = ["def f(x):\n    return ", "import os\nimport sys\n", "class A:\n    def __init__(self):\n"]
SHORT = TuneOptions(max_new_tokens=24)


class Scripted:
    """A drafter of one fixed tree."""

    name = "scripted"
    default_nodes = 4
    reads: frozenset[str] = frozenset()
    class_count = 3

    def open(self, sequence: DraftSequence, target: Any) -> None: ...

    def observe(self, sequence: DraftSequence, rows: Any, path: Sequence[int]) -> None: ...

    def price(self, nodes: int, depth: int) -> float:
        return 0.0

    def close(self, sequence: DraftSequence) -> None: ...

    def prior_rates(self) -> list[float]:
        return [0.5] * 3

    def use_rates(self, rates: Sequence[float]) -> None: ...

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        ids, parents, classes = np.array([10, 11, 12, 13]), np.array([ROOT, ROOT, 0, 2]), np.array([0, 0, 1, 2])
        return [DraftTree(ids, parents, np.zeros(4, np.float32), classes=classes) for _ in requests]


def test_recorder_counts_nodes_whose_parent_was_accepted() -> None:
    recorder = Recorder(Scripted())
    recorder.propose([draft_request([1])])
    recorder.propose([draft_request([1, 10, 99])])  # 10 of class 0 accepted, 11 of it not; 12 of class 1 not; 13 never reached
    assert recorder.seen.tolist() == [2, 1, 0] and recorder.accepted.tolist() == [1, 0, 0]
    recorder.close(draft_request([1, 10, 99, 10, 12, 13, 5]).sequence)
    assert recorder.seen.tolist() == [4, 2, 1] and recorder.accepted.tolist() == [2, 1, 1]
    assert recorder.rates()[2] == pytest.approx((1 + PRIOR_WEIGHT * 0.5) / (1 + PRIOR_WEIGHT))


@pytest.fixture(scope="module")
def tuned(pycode: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32: which trees are verified depends on measured times, and integer rounding may differ at near-ties in trees."""
    bundle = tmp_path_factory.mktemp("tuned") / "bundle"
    shutil.copytree(pycode.path, bundle)
    build(bundle)
    tune(bundle, PROMPTS, threads=1, options=SHORT)
    return bundle


def test_copies_stand_before_what_costs_more() -> None:
    found = {name: DrafterTuning((0.5,), 1.0, length, 1.0) for name, length in (("ngram", 2.0), ("medusa", 3.0))}
    assert {name: pair.enough for name, pair in drafter_pairs(found).items()} == {"ngram+medusa": 3.0}
    found["source_copy"] = DrafterTuning((0.9, 0.8), 0.5, 4.0, 1.0)
    pairs = drafter_pairs(found)
    assert {name: pair.enough for name, pair in pairs.items()} == {
        "source_copy+ngram": 2.0,
        "source_copy+medusa": 3.0,
        "ngram+medusa": 3.0,
    }
    assert pairs["source_copy+ngram"].rates == (0.9, 0.8, 0.5) and pairs["source_copy+ngram"].draft_ms == 1.5


def test_tuning_is_read_back_and_decides_auto(tuned: Path) -> None:
    model = load(tuned, threads=1)
    assert model.tuning is not None and model.tuning.chosen in ("none", "medusa", "ngram", "ngram+medusa")
    assert set(model.tuning.drafters) == {"medusa", "ngram", "ngram+medusa"}
    assert all(0 < rate < 1 for one in model.tuning.drafters.values() for rate in one.rates)
    drafter = model.generator.drafter("auto")
    assert (drafter.name if drafter else "none") == model.tuning.chosen
    curve = model.tuning.verify.curve(1, 100)
    assert (np.diff(curve[1:]) >= 0).all() and curve[1] > 0


@pytest.mark.parametrize("drafter", ["medusa", "ngram", "ngram+medusa", "auto"])
def test_budgets_change_no_token(tuned: Path, drafter: str) -> None:
    model = load(tuned, threads=1)
    for prompt in PROMPTS:
        plain = model.generate(prompt, max_new_tokens=40, drafter="none", ignore_end=True)
        assert model.generate(prompt, max_new_tokens=40, drafter=drafter, ignore_end=True).token_ids == plain.token_ids


def test_resting_is_seen_in_the_stats(tuned: Path) -> None:
    """A drafter whose rows cost far too much proposes nothing at all."""
    import dataclasses

    model = load(tuned, threads=1)
    assert model.tuning is not None
    line = tuple(float(ms) for ms in range(1, 1000, 90))
    cost = VerifyCost((dataclasses.replace(model.tuning.verify.single, milliseconds=(line, line)),))
    tuning = dataclasses.replace(model.tuning, verify=cost)
    dear = Model(model.bundle, model.engine, model.tokenizer, model.generator.drafters, tuning)
    result = dear.generate(PROMPTS[0], max_new_tokens=40, drafter="medusa", ignore_end=True)
    assert result.stats.drafted_tokens == 0 and result.stats.acceptance_length == 1.0


def test_a_tuning_of_another_engine_is_refused(tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="its threads is '1', here '2'"):
        load(tuned, threads=2)
    assert load(tuned, threads=2, tuned=False).tuning is None
    copy = tmp_path / "copy"
    shutil.copytree(tuned, copy)
    file = tuning_file(Bundle.load(copy), "cpu")
    found = json.loads(file.read_text())
    for key, value in (("engine", "canonical"), ("processor", "another"), ("graphs", "0" * 16)):
        file.write_text(json.dumps(found | {"fingerprint": found["fingerprint"] | {key: value}}))
        with pytest.raises(EngineError, match=f"its {key} is"):
            load(copy, threads=1)
    file.write_text("{}")
    with pytest.raises(EngineError, match="no valid tuning file"):
        load(copy, threads=1)


def test_a_draft_model_is_tuned_to_the_depth_that_pays(tuned: Path, tmp_path: Path) -> None:
    """The sample drafts for itself: its own step is as dear as the target's, so that depth has a price."""
    copy = tmp_path / "copy"
    shutil.copytree(tuned, copy)
    found = tune(copy, PROMPTS, threads=1, draft_model=tuned, options=SHORT, force=True)
    assert {"draft_model", "ngram+draft_model"} <= set(found.drafters)
    rates = found.drafters["draft_model"].rates
    deepest = sum(rate > 0 for rate in rates)
    assert 1 <= deepest < len(rates) and not any(rates[deepest:])
    model = load(copy, threads=1, draft_model=tuned)
    plain = model.generate(PROMPTS[0], max_new_tokens=24, drafter="none", ignore_end=True)
    drafted = model.generate(PROMPTS[0], max_new_tokens=24, drafter="draft_model", ignore_end=True)
    assert drafted.token_ids == plain.token_ids and drafted.stats.acceptance_length <= deepest + 1
    alone = load(copy, threads=1)
    assert "draft_model" not in alone.drafters
    if "draft_model" in found.chosen:
        with pytest.raises(OptionError, match="no draft model was loaded"):
            alone.generate(PROMPTS[0])


def test_bad_input(tuned: Path, bundle_of: BundleOf) -> None:
    with pytest.raises(OutputError, match="is not overwritten"):
        tune(tuned, PROMPTS, threads=1)
    with pytest.raises(OptionError, match="Tuning, measured or simulated, needs prompts"):
        tune(bundle_of("llama").path, [])
    with pytest.raises(OptionError, match="--max-nodes must lie between"):
        TuneOptions(max_nodes=64)


def test_bench_measures_every_drafter_and_class(tuned: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": text, "class": kind} for text, kind in zip(PROMPTS, ("short", "short", "long"), strict=True)]
    file.write_text("\n".join(map(json.dumps, lines)))
    classes = read_prompt_classes(file)
    assert {kind: len(texts) for kind, texts in classes.items()} == {"short": 2, "long": 1}
    result = bench(load(tuned, threads=1), classes, max_new_tokens=16, rounds=2)
    wanted = {(d, c) for d in ("none", "medusa", "ngram", "ngram+medusa", "auto") for c in ("short", "long")}
    assert {(row.drafter, row.prompt_class) for row in result.rows} == wanted
    plain = next(row for row in result.rows if row.drafter == "none")
    assert plain.acceptance_length == 1.0 and plain.round_cost == pytest.approx(1.0) and plain.speedup == pytest.approx(1.0)
    assert all(row.slowest <= row.decode_tokens_per_s <= row.fastest for row in result.rows)
    assert set(result.verify_ms) and all(len(line) == 12 for line in result.verify_ms.values())
    pytest.importorskip("matplotlib")
    draw(result, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_nodes_cost_what_rounds_take_beyond_a_plain_one() -> None:
    """However generous the trees: small ones must not be charged for what large ones took."""
    assert node_cost([(32.0, 2.1), (8.0, 0.9), (0.0, 0.5)], 0.5) == pytest.approx(0.05)
    assert node_cost([(4.0, 0.4)], 0.5) == 0.0 and node_cost([], 0.5) == 0.0

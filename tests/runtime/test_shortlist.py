"""Tokens decided with a short list are the target's own: whatever is listed, drafted, or asked for besides."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.calibration.tune import TuneOptions, tune
from headstart.exporter.build import build
from headstart.exporter.heads.shortlist import add_shortlist
from headstart.runtime.bundle import Bundle
from headstart.runtime.contract import HIDDEN
from headstart.runtime.drafters.base import DraftRequest, DraftSequence, Features
from headstart.runtime.drafters.ngram import NGramDrafter, NGramIndex
from headstart.runtime.drafters.shortlist import LONGEST_WAIT, REST, Pace, Shortlist, ShortlistDrafter, TextRows
from headstart.runtime.graph import SplitDecoder
from headstart.runtime.loading import load
from headstart.runtime.model import Model
from headstart.runtime.prefill import decoder_inputs, open_state, prefill
from headstart.runtime.rules import TokenRules
from headstart.runtime.scheduler import Scheduler, decode_alone
from headstart.runtime.sequence import Request
from headstart.runtime.tree import DraftTree
from headstart.runtime.verify_cost import RunningCost

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
BundleOf = Callable[[str], Bundle]
PROMPTS = [
    "import os\nimport sys\n\n\ndef main(",
    "class Node:\n    def __init__(self, left, right):\n        self.left",
    "x = [1, 2",
]
NEW, LISTED = 48, 2048


def _listed(bundle: Path, folder: Path, token_ids: Any) -> None:
    shutil.copytree(bundle, folder)
    add_shortlist(folder, np.asarray(token_ids, np.int64))
    build(folder)


@pytest.fixture(scope="module", params=["float32", "int8"])
def model(request: pytest.FixtureRequest, pycode: Bundle, made_once: MadeOnce) -> Model:
    """The shipped sample (vocabulary 4,096) with a list of its lower half."""
    base = pycode.path
    if request.param == "int8":
        base = made_once("samples/pycode-int8", lambda folder: quantize(pycode.path, folder, QuantizeOptions(weights="int8")))
    return load(made_once(f"samples/listed-{request.param}", lambda folder: _listed(base, folder, range(LISTED))))


@pytest.fixture(scope="module")
def misser(pycode: Bundle, made_once: MadeOnce) -> Model:
    """The same with a list that hardly any text is made of."""
    return load(made_once("samples/listed-hardly", lambda folder: _listed(pycode.path, folder, range(4000, 4040))))


def _copying(model: Model) -> ShortlistDrafter:
    """A short list with n-grams in provisional passes."""
    return _listed_drafter(model).after(NGramDrafter())


def _listed_drafter(model: Model) -> ShortlistDrafter:
    shortlist = model.generator.drafters["shortlist"]
    assert isinstance(shortlist, ShortlistDrafter)
    return shortlist


@pytest.fixture(autouse=True)
def always_waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On models this small the LM head takes next to nothing, and waiting for it would soon be given up."""
    for name in {"model", "misser"} & set(request.fixturenames):
        loaded: Model = request.getfixturevalue(name)
        loaded.generator.drafters["copies"] = _copying(loaded)
        loaded.generator.drafters["heads"] = _listed_drafter(loaded).after(loaded.generator.drafters["medusa"])
        monkeypatch.setattr(Pace, "enough", lambda pace, confidences: len(confidences) >= 5)
        monkeypatch.setattr(Pace, "rest", lambda pace: None)


@pytest.mark.parametrize("drafter", ["shortlist", "copies", "heads"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_texts_are_the_targets_own(model: Model, drafter: str, prompt: str) -> None:
    plain = model.generate(prompt, max_new_tokens=NEW, drafter="none")
    listed = model.generate(prompt, max_new_tokens=NEW, drafter=drafter)
    assert listed.token_ids == plain.token_ids
    assert listed.finish_reason == plain.finish_reason


@pytest.mark.parametrize("drafter", ["shortlist", "copies", "heads"])
def test_a_list_that_always_misses_changes_nothing(misser: Model, drafter: str) -> None:
    for prompt in PROMPTS:
        plain = misser.generate(prompt, max_new_tokens=NEW, drafter="none")
        assert misser.generate(prompt, max_new_tokens=NEW, drafter=drafter).token_ids == plain.token_ids


def test_untuned_bundles_use_their_list(model: Model) -> None:
    auto, plain = (model.generate(PROMPTS[1], max_new_tokens=NEW, drafter=name) for name in ("auto", "none"))
    assert auto.stats.drafter == "ngram+shortlist" and auto.token_ids == plain.token_ids


class Witness(NGramDrafter):
    """Notes which state decided each root that it was asked to draft after."""

    reads = frozenset({HIDDEN})

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[tuple[int, ...], NDArray[np.float32]] = {}
        self._last: NDArray[np.float32] | None = None

    def observe(self, sequence: DraftSequence, rows: Features, path: Sequence[int]) -> None:
        assert len(rows[HIDDEN]) == len(path)
        super().observe(sequence, rows, path)
        self._last = rows[HIDDEN][-1]

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        assert self._last is not None
        self.states[tuple(requests[0].sequence.token_ids)] = self._last
        return super().propose(requests)


def test_heads_read_the_states_that_decided_the_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    _assert_same_states(model, monkeypatch)


def test_heads_read_the_states_of_what_was_decided_instead(misser: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    _assert_same_states(misser, monkeypatch)


def _assert_same_states(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a short list and without."""
    drafters = model.generator.drafters
    plain, listed = Witness(), Witness()
    monkeypatch.setitem(drafters, "plain witness", plain)
    monkeypatch.setitem(drafters, "witness", _listed_drafter(model).after(listed))
    for prompt in PROMPTS:
        for name in ("plain witness", "witness"):
            model.generate(prompt, max_new_tokens=NEW, drafter=name)
    common = plain.states.keys() & listed.states.keys()
    assert len(common) > 12
    for text in common:
        np.testing.assert_allclose(listed.states[text], plain.states[text], atol=0.05 * np.abs(plain.states[text]).max())


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 9])
def test_lengths_end_where_they_should(model: Model, new_tokens: int) -> None:
    plain = model.generate(PROMPTS[0], max_new_tokens=new_tokens, drafter="none")
    assert model.generate(PROMPTS[0], max_new_tokens=new_tokens, drafter="shortlist").token_ids == plain.token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram": 2},
        {"logprobs": 3},
        {"stop": ["self", "\n\n"]},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.0, "top_k": 20, "seed": 6, "logprobs": 1},
    ],
)
def test_options_mean_what_they_mean_without_it(model: Model, options: dict[str, Any]) -> None:
    for prompt in PROMPTS:
        plain = model.generate(prompt, max_new_tokens=NEW, drafter="none", **options)
        listed = model.generate(prompt, max_new_tokens=NEW, drafter="shortlist", **options)
        assert (listed.text, listed.token_ids, listed.finish_reason) == (plain.text, plain.token_ids, plain.finish_reason)
        for ours, theirs in zip(listed.log_probs, plain.log_probs, strict=True):
            assert ours.log_prob == pytest.approx(theirs.log_prob, abs=1e-4)
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


def test_sequences_join_while_tokens_are_provisional(model: Model) -> None:
    """One decodes alone at first; the second joins, and what the first has not checked yet is checked."""
    plain = [model.generate(prompt, max_new_tokens=NEW, drafter="none").token_ids for prompt in PROMPTS[:2]]
    first = model.start([PROMPTS[0]], max_new_tokens=NEW, drafter="shortlist")
    pieces = first.pieces()
    next(pieces)
    second = model.start([PROMPTS[1]], max_new_tokens=NEW, drafter="shortlist")
    for _ in second.pieces():
        pass
    for _ in pieces:
        pass
    assert [first.results()[0].token_ids, second.results()[0].token_ids] == plain


def test_a_cancelled_text_has_no_provisional_tokens(model: Model) -> None:
    plain = model.generate(PROMPTS[0], max_new_tokens=NEW, drafter="none").token_ids
    drafter = model.generator.drafters["shortlist"]
    scheduler = Scheduler(model.engine)
    sequence = scheduler.sequence(scheduler.add(Request(tuple(model.tokenizer.encode(PROMPTS[0])), NEW, drafter=drafter)))
    while sequence.provisional is None:
        scheduler.step()
    scheduler.cancel(sequence.id)
    scheduler.step()
    assert sequence.finish_reason == "cancelled"
    assert 0 < len(sequence.output_ids) < NEW
    assert sequence.output_ids == plain[: len(sequence.output_ids)]


def test_the_lm_head_runs_once_for_several_tokens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, rows = model.engine.graph("decoder"), []
    assert isinstance(decoder, SplitDecoder)
    score = decoder.score
    monkeypatch.setattr(decoder, "score", lambda hidden: rows.append(len(hidden)) or score(hidden))
    found = model.generate(PROMPTS[0], max_new_tokens=NEW, drafter="shortlist")
    assert len(rows) < 0.7 * len(found.token_ids)
    assert sum(rows) >= len(found.token_ids) - 1  # the first is the prompt's


def test_pieces_are_only_what_was_checked(misser: Model) -> None:
    whole = misser.generate(PROMPTS[1], max_new_tokens=NEW, drafter="none").text
    text = ""
    for piece in misser.stream(PROMPTS[1], max_new_tokens=NEW, drafter="shortlist"):
        text += piece
        assert whole.startswith(text)
    assert text == whole


def test_scores_are_the_lm_heads(model: Model) -> None:
    """Of listed tokens, and of others that the text has."""
    engine, bundle = model.engine, model.bundle
    ids = model.tokenizer.encode(PROMPTS[1])
    state = open_state(engine, 64)
    prefill(engine, state, ids)
    decoder = engine.graph("decoder")
    assert isinstance(decoder, SplitDecoder)
    rows, at = np.array([ids[:3]]), np.arange(len(ids), len(ids) + 3)[None]
    outputs = decoder.run_body(decoder_inputs(rows, at, np.arange(3)[None]), state)
    hidden = outputs.rows("hidden", 0, range(3))
    whole = decoder.score(hidden)
    text = TextRows(Shortlist(engine.graph("heads/shortlist"), bundle))
    text.update([1, 2, 3, 3001, 4001, 3001])
    short = text.scores(hidden, bundle.manifest.model.vocab_size)
    known = [*range(LISTED), 3001, 4001]
    for row in range(3):
        logits, expected = short[row], whole[row]
        assert np.flatnonzero(np.isfinite(logits)).tolist() == known
        spread = np.ptp(expected)
        assert np.abs(logits[known] - expected[known]).max() < (1e-5 if engine.exact else 0.03) * spread
        assert short.best(row) == int(logits.argmax())


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_encoder_decoders(architecture: str, bundle_of: BundleOf, made_once: MadeOnce) -> None:
    base = bundle_of(architecture).path
    listed = load(made_once(f"listed/{architecture}", lambda folder: _listed(base, folder, range(120))))
    for source in ("some words to read", "abc"):
        plain = listed.generate(source, max_new_tokens=24, drafter="none").token_ids
        assert listed.generate(source, max_new_tokens=24, drafter="shortlist").token_ids == plain


def test_it_is_not_offered_where_the_lm_head_cannot_wait(pycode: Bundle, tmp_path: Path) -> None:
    shutil.copytree(pycode.path, tmp_path / "bundle")
    add_shortlist(tmp_path / "bundle", np.arange(100))
    assert "shortlist" not in load(tmp_path / "bundle").drafters


def _decode(pace: Pace, confidence: float, missed: Callable[[int], int | None]) -> list[int]:
    """Let 60 checks happen; `missed`: number of the check -> place of the token that is missed. Returns their tokens."""
    lengths = []
    for check in range(60):
        confidences: list[float] = []
        while not (confidences and pace.enough(confidences)):
            pace.gathered(1, 7.0)
            confidences.append(confidence)
        place = missed(check)
        is_missed = place is not None and place < len(confidences)
        kept = place + 1 if place is not None and is_missed else len(confidences)
        pace.checked(confidences, kept, is_missed, 6.0 + 0.4 * len(confidences))
        lengths.append(len(confidences))
    return lengths


def test_sure_tokens_gather_and_unsure_ones_are_checked() -> None:
    sure = _decode(Pace(), 0.95, lambda check: None)
    unsure = _decode(Pace(), 0.15, lambda check: 2)
    assert max(sure) == LONGEST_WAIT
    assert max(unsure[1:]) <= 5 < min(sure[1:])


def test_risks_are_learned() -> None:
    """The same confidence, first always right, then mostly wrong."""
    pace = Pace()
    long = _decode(pace, 0.4, lambda check: None)[-1]
    short = _decode(pace, 0.4, lambda check: 1)[-1]
    assert short <= 6 < long


def test_a_list_of_no_use_rests() -> None:
    pace = Pace()
    _decode(pace, 0.4, lambda check: 0)
    assert [pace.begin_round() for _ in range(REST + 1)] == [False] * REST + [True]


def test_nan_is_checked_soon() -> None:
    pace = Pace()
    _decode(pace, 0.95, lambda check: None)
    assert not pace.enough([0.95] * 4)
    assert pace.enough([0.95, np.nan, np.nan, np.nan])


def test_an_index_forgets_what_was_taken_back() -> None:
    rng = np.random.default_rng(3)
    text, other = rng.integers(0, 4, 80).tolist(), rng.integers(0, 4, 30).tolist()
    index, fresh = NGramIndex(3, 1), NGramIndex(3, 1)
    index.update(text[:50])
    index.update(text)
    index.forget(50)
    index.update(text[:50] + other)
    fresh.update(text[:50] + other)
    assert set(index.matches(4)) <= {(end, length) for end, length in fresh.matches(50)}
    assert index.matches(1)[0][1] == fresh.matches(1)[0][1]


def test_a_token_that_was_missed_is_known_from_then_on(pycode: Bundle, misser: Model) -> None:
    """What the whole vocabulary decided in place of provisional tokens counts as the text's own."""
    shortlist = misser.generator.drafters["shortlist"]
    assert isinstance(shortlist, ShortlistDrafter)
    text = DraftSequence(1, [1, 2, 3], 3)
    hidden = np.zeros((1, misser.bundle.manifest.model.hidden_size), np.float32)
    text.token_ids += [4000, 4001, 4002, 4003]  # provisional
    shortlist.scores(text, hidden)
    text.token_ids[3:] = [77]
    shortlist.taken_back(text, 3)
    text.token_ids += [4004]
    assert 77 in shortlist.scores(text, hidden).own_ids.tolist()
    shortlist.close(text)


def test_rules_that_leave_no_listed_token(misser: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be decided provisionally, the whole vocabulary decides."""
    drafter = misser.generator.drafters["shortlist"]
    assert isinstance(drafter, ShortlistDrafter)
    rested: list[int] = []
    monkeypatch.setattr(Pace, "rest", lambda pace: (rested.append(1), setattr(pace, "_rest", 4)))
    monkeypatch.setattr(TextRows, "_add", lambda rows, token_ids: None)  # the list's own 40 tokens and no others
    prompt = tuple(misser.tokenizer.encode(PROMPTS[0]))
    rules = TokenRules(forbidden_sequences=tuple((token,) for token in range(4000, 4040)))
    plain = decode_alone(misser.engine, Request(prompt, 24, rules=rules))
    listed = decode_alone(misser.engine, Request(prompt, 24, rules=rules, drafter=drafter))
    assert rested and listed.token_ids == plain.token_ids


def test_tuning_measures_provisional_passes(model: Model, tmp_path: Path) -> None:
    """By themselves: the budget of a pair must not think that each of its passes runs the LM head."""
    path = Path(shutil.copytree(model.bundle.path, tmp_path / "bundle"))
    made = tune(path, PROMPTS, options=TuneOptions(max_new_tokens=16))
    assert made.provisional is not None and {"shortlist", "ngram+shortlist"} <= made.drafters.keys()
    assert {"medusa+shortlist", "ngram+medusa+shortlist"} <= made.drafters.keys() and "shortlist+medusa" not in made.drafters
    assert made.provisional.single.rows == made.verify.single.rows and made.provisional != made.verify
    drafters = load(path).generator.drafters
    for name in ("shortlist", "ngram+shortlist", "ngram+medusa+shortlist"):
        drafter = drafters[name]
        assert isinstance(drafter, ShortlistDrafter) and drafter.cost == made.provisional
    assert drafters["ngram+medusa+shortlist"].reads == {HIDDEN}
    untuned = load(path, tuned=False).generator.drafters["shortlist"]
    assert isinstance(untuned, ShortlistDrafter) and isinstance(untuned.cost, RunningCost)

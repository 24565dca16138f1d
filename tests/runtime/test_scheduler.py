"""The scheduler on a real engine: whatever drafters propose and whoever else decodes, each text is the target's own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.bundle import Bundle
from headstart.runtime.drafters.aligned_copy import AlignedCopyDrafter
from headstart.runtime.drafters.base import DraftRequest, DraftSequence, Target
from headstart.runtime.drafters.draft_model import DraftModelDrafter
from headstart.runtime.drafters.ngram import NGramDrafter
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import OptionError, PromptError
from headstart.runtime.rules import TokenRules
from headstart.runtime.sampling import SamplingOptions
from headstart.runtime.scheduler import Event, Scheduler
from headstart.runtime.sequence import Request
from headstart.runtime.sequence import Sequence as Text
from headstart.runtime.tree import ROOT, DraftTree

BundleOf = Callable[[str], Bundle]
PROMPTS = [[5, 9, 17, 30, 5, 9], [200, 3, 3, 90, 41, 7, 7, 250, 11, 12, 13], [60] * 20]


class RandomTrees:
    """Proposes noise: a random tree in which some nodes hold the right token."""

    name = "random"
    default_nodes = 7
    class_count = 0
    reads: frozenset[str] = frozenset()

    def __init__(self, answers: Sequence[Sequence[int]], seed: int = 0) -> None:
        """`answers`: the whole texts, found by their prompts."""
        self.answers = answers
        self.generator = np.random.default_rng(seed)
        self.opened: dict[int, Sequence[int]] = {}

    def prior_rates(self) -> list[float]:
        return []

    def use_rates(self, rates: Sequence[float]) -> None: ...

    def open(self, sequence: DraftSequence, target: Target) -> None:
        prompt = sequence.token_ids
        self.opened[sequence.id] = next((a for a in self.answers if list(a[: len(prompt)]) == prompt), self.answers[0])

    def observe(self, sequence: DraftSequence, rows: Mapping[str, NDArray[np.float32]], path: Sequence[int]) -> None: ...

    def price(self, nodes: int, depth: int) -> float:
        return 0.0

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        return [self._tree(request) for request in requests]

    def close(self, sequence: DraftSequence) -> None:
        self.opened.pop(sequence.id, None)

    def _tree(self, request: DraftRequest) -> DraftTree:
        count = int(self.generator.integers(0, request.max_nodes + 1))
        parents = [int(self.generator.integers(ROOT, node)) if node else ROOT for node in range(count)]
        depths = []
        for parent in parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        right = self.opened[request.sequence.id][len(request.sequence.token_ids) :]
        tokens = [
            right[d - 1] if d <= len(right) and self.generator.random() < 0.7 else int(self.generator.integers(300))
            for d in depths
        ]
        return DraftTree(np.array(tokens, np.int64), np.array(parents, np.int64), -np.array(depths, np.float32))


@pytest.fixture(scope="module")
def engine(bundle_of: BundleOf) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle_of("llama"))


def seed_of(options: Mapping[str, Any], row: int) -> np.random.SeedSequence:
    seed = options["sampling"].seed if "sampling" in options else None
    return np.random.SeedSequence(None if seed is None else (seed, row))


def decode(engine: OnnxRuntimeEngine, prompts: list[list[int]], drafter: Any = None, **options: Any) -> list[Text]:
    """All prompts together, to their ends."""
    scheduler = Scheduler(engine)
    requests = [
        Request(tuple(prompt), drafter=drafter, seed=seed_of(options, row), **options) for row, prompt in enumerate(prompts)
    ]
    texts = [scheduler.sequence(scheduler.add(request)) for request in requests]
    emitted = run(scheduler)
    for text in texts:
        assert text.output_ids == emitted[text.id], "what was announced is what was kept"
    return texts


def run(scheduler: Scheduler) -> dict[int, list[int]]:
    """To the end; tokens by request."""
    emitted: dict[int, list[int]] = {}
    while not scheduler.idle:
        for event in scheduler.step():
            emitted.setdefault(event.id, []).extend(event.token_ids)
    return emitted


def tokens_of(texts: Sequence[Text]) -> list[list[int]]:
    return [text.token_ids for text in texts]


def test_plain_greedy_equals_the_checkpoint(engine: OnnxRuntimeEngine) -> None:
    from architectures import tiny_model

    from headstart.exporter.golden import reference_greedy

    for prompt in PROMPTS:
        wanted = reference_greedy(tiny_model("llama"), np.array([prompt]), 40)[0].tolist()
        assert tokens_of(decode(engine, [prompt], max_new_tokens=40)) == [prompt + wanted]


@pytest.mark.parametrize("seed", range(4))
def test_random_trees_change_nothing(engine: OnnxRuntimeEngine, seed: int) -> None:
    plain = tokens_of(decode(engine, PROMPTS, max_new_tokens=50))
    texts = decode(engine, PROMPTS, RandomTrees(plain, seed), max_new_tokens=50)
    assert tokens_of(texts) == plain
    assert all(text.verify_calls < 49 for text in texts), "some drafts were right, so rounds were saved"


def test_ngram_and_draft_model_change_nothing(engine: OnnxRuntimeEngine, bundle_of: BundleOf) -> None:
    plain = tokens_of(decode(engine, PROMPTS, max_new_tokens=50))
    assert tokens_of(decode(engine, PROMPTS, NGramDrafter(), max_new_tokens=50)) == plain
    same = DraftModelDrafter("draft_model", OnnxRuntimeEngine(bundle_of("llama")))
    texts = decode(engine, PROMPTS, same, max_new_tokens=51, draft_nodes=4)
    assert tokens_of(texts)[0][:-1] == plain[0]
    assert [text.verify_calls for text in texts] == [10, 10, 10], "a draft equal to the target is always right"
    other = DraftModelDrafter("draft_model", OnnxRuntimeEngine(bundle_of("qwen2")))
    assert tokens_of(decode(engine, PROMPTS, other, max_new_tokens=50)) == plain


def test_aligned_copies_change_nothing_and_save_rounds(engine: OnnxRuntimeEngine) -> None:
    """The text to copy is the output itself with a token replaced, one inserted and one left out."""
    plain = tokens_of(decode(engine, PROMPTS, max_new_tokens=50))
    copies = []
    for text, prompt in zip(plain, PROMPTS, strict=True):
        new = text[len(prompt) :]
        copies.append([*new[:10], 299, *new[11:20], 298, *new[20:30], *new[31:]])
    drafter = AlignedCopyDrafter("copy", lambda s: copies[PROMPTS.index(s.token_ids[: s.prompt_tokens])])
    texts = decode(engine, PROMPTS, drafter, max_new_tokens=50)
    assert tokens_of(texts) == plain
    assert all(text.verify_calls <= 12 for text in texts)


def test_features_of_every_committed_row_reach_the_drafter_that_reads_them(engine: OnnxRuntimeEngine) -> None:
    """The prompt's rows, in chunks, then each accepted row: together those of one pass over the whole text."""

    class Reader(RandomTrees):
        reads = frozenset({contract.HIDDEN})

        def observe(self, sequence: DraftSequence, rows: Mapping[str, NDArray[np.float32]], path: Sequence[int]) -> None:
            assert len(path) == len(rows[contract.HIDDEN])
            features.append(rows[contract.HIDDEN])
            tokens.extend(path)

    features: list[NDArray[np.float32]] = []
    tokens: list[int] = []
    prompt = np.random.default_rng(1).integers(3, 300, 30).tolist()
    plain = tokens_of(decode(engine, [prompt], max_new_tokens=40))
    text = decode(engine, [prompt], Reader(plain), max_new_tokens=40)[0]
    assert tokens == text.token_ids[: len(tokens)] and len(tokens) >= len(text.token_ids) - 8
    decoder, count = engine.graph("decoder"), len(tokens)
    rows = np.arange(count)[None]
    inputs = {contract.INPUT_IDS: np.array([tokens]), contract.POSITION_IDS: rows, contract.OUTPUT_ROWS: rows[:, -1:]}
    wanted = decoder.run(inputs, decoder.new_state(1, count), np.tri(count, dtype=np.bool_)[None])[contract.HIDDEN][0]
    assert np.abs(np.concatenate(features) - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_batch_equals_single_runs(engine: OnnxRuntimeEngine) -> None:
    for drafter in (None, NGramDrafter()):
        singles = [tokens_of(decode(engine, [p], drafter, max_new_tokens=30))[0] for p in PROMPTS]
        assert tokens_of(decode(engine, PROMPTS, drafter, max_new_tokens=30)) == singles


def test_sampled_runs_repeat_with_their_seed(engine: OnnxRuntimeEngine) -> None:
    options = {"max_new_tokens": 30, "sampling": SamplingOptions(temperature=1.0, seed=5)}
    first = tokens_of(decode(engine, PROMPTS, NGramDrafter(), **options))
    assert first == tokens_of(decode(engine, PROMPTS, NGramDrafter(), **options))
    other = {"max_new_tokens": 30, "sampling": SamplingOptions(temperature=1.0, seed=6)}
    assert first != tokens_of(decode(engine, PROMPTS, NGramDrafter(), **other))


def test_sampled_drafts_repeat_with_the_seed_too(engine: OnnxRuntimeEngine, bundle_of: BundleOf) -> None:
    drafter = DraftModelDrafter("draft_model", OnnxRuntimeEngine(bundle_of("qwen2")))
    options = {"max_new_tokens": 30, "sampling": SamplingOptions(temperature=1.0, seed=5)}
    assert tokens_of(decode(engine, PROMPTS, drafter, **options)) == tokens_of(decode(engine, PROMPTS, drafter, **options))


def test_sampled_draft_model_equal_to_the_target_is_always_accepted(engine: OnnxRuntimeEngine, bundle_of: BundleOf) -> None:
    drafter = DraftModelDrafter("draft_model", OnnxRuntimeEngine(bundle_of("llama")))
    sampling = SamplingOptions(temperature=0.8, seed=1)
    texts = decode(engine, PROMPTS[:1], drafter, max_new_tokens=41, draft_nodes=4, sampling=sampling)
    assert texts[0].verify_calls <= 9  # 8 when rounding never tips a test


def test_rules_are_kept_by_whatever_is_drafted(engine: OnnxRuntimeEngine, bundle_of: BundleOf) -> None:
    """Rules of the model and of the length, against transformers' generate."""
    import torch
    from architectures import tiny_model

    plain = tokens_of(decode(engine, PROMPTS, max_new_tokens=30))
    never, ends = tuple({text[-3] for text in plain}), frozenset({plain[0][len(PROMPTS[0]) + 5], 2})
    rules = TokenRules(
        forced_eos_token_ids=(2,),
        begin_suppress_tokens=tuple(text[len(prompt)] for text, prompt in zip(plain, PROMPTS, strict=True)),
        min_new_tokens=12,
        forbidden_sequences=((plain[1][-6], plain[1][-5]),),
    )
    sampling = SamplingOptions(no_repeat_ngram=3, suppress_tokens=never)
    wanted = []
    for prompt in PROMPTS:
        reference = tiny_model("llama").generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=30,
            min_new_tokens=rules.min_new_tokens,
            eos_token_id=sorted(ends),
            forced_eos_token_id=2,
            begin_suppress_tokens=list(rules.begin_suppress_tokens),
            bad_words_ids=[list(sequence) for sequence in rules.forbidden_sequences],
            suppress_tokens=list(never),
            no_repeat_ngram_size=3,
        )
        wanted.append(reference[0].tolist())
    options: dict[str, object] = {"max_new_tokens": 30, "rules": rules, "sampling": sampling, "end_tokens": ends}
    drafters = (
        None,
        RandomTrees(plain),
        RandomTrees(wanted),
        DraftModelDrafter("draft_model", OnnxRuntimeEngine(bundle_of("llama"))),
    )
    for drafter in drafters:
        assert tokens_of(decode(engine, PROMPTS, drafter, **options)) == wanted
    assert wanted[0] != plain[0] and wanted[0][-1] == 2


@pytest.mark.parametrize("count", [1, 2, 7])
def test_length_limit_is_exact(engine: OnnxRuntimeEngine, count: int) -> None:
    plain = tokens_of(decode(engine, PROMPTS, max_new_tokens=50))
    texts = decode(engine, PROMPTS, RandomTrees(plain), max_new_tokens=count)
    assert [text.new_tokens for text in texts] == [count] * 3
    assert {text.finish_reason for text in texts} == {"length"}


def test_end_token_inside_an_accepted_run(engine: OnnxRuntimeEngine) -> None:
    plain = tokens_of(decode(engine, PROMPTS, max_new_tokens=50))
    new = plain[0][len(PROMPTS[0]) :]
    end = next(token for i, token in enumerate(new) if i > 8 and token not in new[:i])
    wanted = new[: new.index(end) + 1]
    for drafter in (None, RandomTrees(plain), DraftModelDrafter("draft_model", engine)):
        texts = decode(engine, PROMPTS[:1], drafter, max_new_tokens=50, end_tokens=frozenset({end}))
        assert texts[0].token_ids[len(PROMPTS[0]) :] == wanted
        assert texts[0].finish_reason == "end_token"


def test_generation_stops_cleanly_at_the_end_of_the_cache(engine: OnnxRuntimeEngine) -> None:
    prompt = np.random.default_rng(0).integers(3, 300, 230).tolist()
    plain = decode(engine, [prompt], max_new_tokens=100)
    assert plain[0].finish_reason == "cache_full"
    assert len(plain[0].token_ids) == engine.model.max_cache == 256
    drafted = decode(engine, [prompt], RandomTrees(tokens_of(plain)), max_new_tokens=100)
    assert tokens_of(drafted) == tokens_of(plain)
    assert drafted[0].finish_reason == "cache_full"


def test_prompts_that_cannot_be_decoded(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(PromptError, match="empty"):
        decode(engine, [[]])
    with pytest.raises(PromptError, match="256 tokens"):
        decode(engine, [[5] * 256])
    with pytest.raises(OptionError, match="max_new_tokens"):
        decode(engine, PROMPTS, max_new_tokens=0)
    with pytest.raises(OptionError, match="draft_nodes"):
        decode(engine, PROMPTS, draft_nodes=64)


@pytest.mark.parametrize("drafter", [None, NGramDrafter()])
def test_requests_join_and_leave_between_rounds(engine: OnnxRuntimeEngine, drafter: Any) -> None:
    """Each with its own limits; whoever comes and goes, each text is what it is alone."""
    generator = np.random.default_rng(3)
    requests = [
        Request(tuple(generator.integers(3, 300, int(size)).tolist()), max_new_tokens=int(count), drafter=drafter)
        for size, count in zip(generator.integers(1, 60, 12), generator.integers(1, 50, 12), strict=True)
    ]
    alone = [decode(engine, [list(r.prompt_ids)], drafter, max_new_tokens=r.max_new_tokens)[0].token_ids for r in requests]
    scheduler, texts = Scheduler(engine, max_batch=4), []
    for request in requests:
        texts.append(scheduler.sequence(scheduler.add(request)))
        for _ in range(int(generator.integers(0, 6))):
            scheduler.step()
    run(scheduler)
    assert tokens_of(texts) == alone


def test_long_prompts_are_read_in_chunks_while_others_decode(
    engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.runtime.scheduler.CHUNK", 16)
    long = np.random.default_rng(5).integers(3, 300, 100).tolist()
    wanted = [decode(engine, [p], max_new_tokens=30)[0].token_ids for p in (PROMPTS[0], long)]
    scheduler = Scheduler(engine)
    first = scheduler.sequence(scheduler.add(Request(tuple(PROMPTS[0]), max_new_tokens=30)))
    scheduler.step()
    second = scheduler.sequence(scheduler.add(Request(tuple(long), max_new_tokens=30)))
    before = first.new_tokens
    while not second.new_tokens:
        scheduler.step()
    assert first.new_tokens - before >= 100 // 16, "a long prompt does not hold up a text that decodes"
    run(scheduler)
    assert tokens_of([first, second]) == wanted


def test_a_cancelled_request_ends_and_the_others_go_on(engine: OnnxRuntimeEngine) -> None:
    scheduler, drafter = Scheduler(engine), RandomTrees([[0] * 99])
    alone = tokens_of(decode(engine, PROMPTS, max_new_tokens=30))
    texts = [scheduler.sequence(scheduler.add(Request(tuple(p), max_new_tokens=30, drafter=drafter))) for p in PROMPTS]
    for _ in range(4):
        scheduler.step()
    scheduler.cancel(texts[0].id)
    events = scheduler.step()
    assert Event(texts[0].id, finish_reason="cancelled") in events
    run(scheduler)
    assert tokens_of(texts[1:]) == alone[1:] and texts[0].new_tokens < 30
    assert not drafter.opened, "drafters forget what has ended"


def test_rules_that_leave_no_token_end_their_request_alone(engine: OnnxRuntimeEngine) -> None:
    nothing = SamplingOptions(suppress_tokens=tuple(range(engine.model.vocab_size)))
    scheduler = Scheduler(engine)
    wanted = tokens_of(decode(engine, PROMPTS[1:2], max_new_tokens=10))
    bad = scheduler.sequence(scheduler.add(Request(tuple(PROMPTS[0]), sampling=nothing)))
    good = scheduler.sequence(scheduler.add(Request(tuple(PROMPTS[1]), max_new_tokens=10)))
    run(scheduler)
    assert bad.finish_reason == "error" and isinstance(bad.error, OptionError) and "forbid every token" in str(bad.error)
    assert tokens_of([good]) == wanted


def test_an_engine_that_fails_ends_what_runs_and_takes_new_requests(
    engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, drafter = Scheduler(engine), RandomTrees([[0] * 99])
    text = scheduler.sequence(scheduler.add(Request(tuple(PROMPTS[0]), drafter=drafter)))
    scheduler.step()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_verify", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scheduler.step()
    assert text.finish_reason == "error" and scheduler.idle and not drafter.opened
    again = scheduler.sequence(scheduler.add(Request(tuple(PROMPTS[0]), max_new_tokens=5)))
    run(scheduler)
    assert again.new_tokens == 5


def test_log_probabilities_are_the_targets_own(engine: OnnxRuntimeEngine) -> None:
    """Of drafted and plain tokens alike, before rules and temperature."""
    plain = tokens_of(decode(engine, PROMPTS[:1], max_new_tokens=20))
    scheduler = Scheduler(engine)
    sampling = SamplingOptions(suppress_tokens=(7,))
    scheduler.add(Request(tuple(PROMPTS[0]), max_new_tokens=20, drafter=RandomTrees(plain), logprobs=3, sampling=sampling))
    found = []
    while not scheduler.idle:
        found += [entry for event in scheduler.step() for entry in event.log_probs]
    decoder, tokens = engine.graph("decoder"), [*PROMPTS[0], *(entry.token_id for entry in found)]
    rows = np.arange(len(tokens))[None]
    inputs = {contract.INPUT_IDS: np.array([tokens]), contract.POSITION_IDS: rows, contract.OUTPUT_ROWS: rows}
    causal = np.tri(len(tokens), dtype=np.bool_)[None]
    logits = decoder.run(inputs, decoder.new_state(1, len(tokens)), causal)[contract.LOGITS][0].astype(np.float64)
    wanted = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert len(found) == 20
    for entry, row in zip(found, wanted[len(PROMPTS[0]) - 1 :], strict=False):
        assert entry.log_prob == pytest.approx(row[entry.token_id], abs=1e-4)
        assert [token for token, _ in entry.top] == np.argsort(-row)[:3].tolist()


def test_token_ids_outside_the_vocabulary_are_refused(engine: OnnxRuntimeEngine) -> None:
    for token in (-1, engine.model.vocab_size):
        with pytest.raises(PromptError, match=f"Token {token} "):
            decode(engine, [[5, token]])


def test_more_sequences_than_a_batch_holds_wait_for_their_turn(engine: OnnxRuntimeEngine) -> None:
    scheduler = Scheduler(engine, max_batch=2)
    texts = [scheduler.sequence(scheduler.add(Request(tuple(p), max_new_tokens=12))) for p in PROMPTS * 2]
    run(scheduler)
    assert tokens_of(texts) == tokens_of(decode(engine, PROMPTS, max_new_tokens=12)) * 2

"""The loop on a real engine: whatever the drafter proposes, the text is the target's own."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from headstart.runtime.bundle import Bundle
from headstart.runtime.drafters.aligned_copy import AlignedCopyDrafter
from headstart.runtime.drafters.base import DraftRequest
from headstart.runtime.drafters.draft_model import DraftModelDrafter
from headstart.runtime.drafters.ngram import NGramDrafter
from headstart.runtime.engines.onnxruntime import OnnxRuntimeEngine
from headstart.runtime.errors import OptionError, PromptError
from headstart.runtime.loop import DecodingLoop, LoopOptions
from headstart.runtime.rules import TokenRules
from headstart.runtime.sampling import SamplingOptions
from headstart.runtime.tree import ROOT, DraftTree

BundleOf = Callable[[str], Bundle]
PROMPTS = [[5, 9, 17, 30, 5, 9], [200, 3, 3, 90, 41, 7, 7, 250, 11, 12, 13], [60] * 20]


class RandomTrees:
    """Proposes noise: a random tree in which, here and there, the right token stands."""

    name = "random"
    default_nodes = 7
    reads_hidden = False

    def __init__(self, answers: Sequence[Sequence[int]], seed: int = 0) -> None:
        self.answers = answers
        self.generator = np.random.default_rng(seed)

    def open(self, batch: int) -> None:
        pass

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        return [self._tree(request) for request in requests]

    def _tree(self, request: DraftRequest) -> DraftTree:
        count = int(self.generator.integers(0, request.max_nodes + 1))
        parents = [int(self.generator.integers(ROOT, node)) if node else ROOT for node in range(count)]
        depths = []
        for parent in parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        right = self.answers[request.row][len(request.token_ids) :]
        tokens = [
            right[d - 1] if d <= len(right) and self.generator.random() < 0.7 else int(self.generator.integers(300))
            for d in depths
        ]
        return DraftTree(np.array(tokens, np.int64), np.array(parents, np.int64), -np.array(depths, np.float32))


@pytest.fixture(scope="module")
def engine(bundle_of: BundleOf) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle_of("llama"))


def decode(engine: OnnxRuntimeEngine, prompts: list[list[int]], drafter: object = None, **options: object) -> DecodingLoop:
    loop = DecodingLoop(engine, drafter, prompts, LoopOptions(**options))  # type: ignore[arg-type]
    emitted: list[list[int]] = [[] for _ in prompts]
    for tokens in loop.rounds():
        for row, new in enumerate(tokens):
            emitted[row] += new
    for text, new in zip(loop.sequences, emitted, strict=True):
        assert text.token_ids[text.prompt_tokens :] == new, "what was announced is what was kept"
    return loop


def tokens_of(loop: DecodingLoop) -> list[list[int]]:
    return [text.token_ids for text in loop.sequences]


def test_plain_greedy_equals_the_checkpoint(engine: OnnxRuntimeEngine) -> None:
    from architectures import tiny_model

    from headstart.exporter.golden import reference_greedy

    for prompt in PROMPTS:
        wanted = reference_greedy(tiny_model("llama"), np.array([prompt]), 40)[0].tolist()
        assert tokens_of(decode(engine, [prompt], max_new_tokens=40)) == [prompt + wanted]


@pytest.mark.parametrize("seed", range(4))
def test_random_trees_change_nothing(engine: OnnxRuntimeEngine, seed: int) -> None:
    plain = tokens_of(decode(engine, PROMPTS, max_new_tokens=50))
    loop = decode(engine, PROMPTS, RandomTrees(plain, seed), max_new_tokens=50)
    assert tokens_of(loop) == plain
    assert all(text.verify_calls < 49 for text in loop.sequences), "some drafts were right, so rounds were saved"


def test_ngram_and_draft_model_change_nothing(engine: OnnxRuntimeEngine, bundle_of: BundleOf) -> None:
    plain = tokens_of(decode(engine, PROMPTS, max_new_tokens=50))
    assert tokens_of(decode(engine, PROMPTS, NGramDrafter(), max_new_tokens=50)) == plain
    same = DraftModelDrafter("draft_model", OnnxRuntimeEngine(bundle_of("llama")))
    loop = decode(engine, PROMPTS, same, max_new_tokens=51, draft_nodes=4)
    assert tokens_of(loop)[0][:-1] == plain[0]
    assert [text.verify_calls for text in loop.sequences] == [10, 10, 10], "a draft equal to the target is always right"
    other = DraftModelDrafter("draft_model", OnnxRuntimeEngine(bundle_of("qwen2")))
    assert tokens_of(decode(engine, PROMPTS, other, max_new_tokens=50)) == plain


def test_aligned_copies_change_nothing_and_save_rounds(engine: OnnxRuntimeEngine) -> None:
    """The text to copy is the output itself with a token replaced, one inserted and one left out."""
    plain = tokens_of(decode(engine, PROMPTS, max_new_tokens=50))
    texts = []
    for text, prompt in zip(plain, PROMPTS, strict=True):
        new = text[len(prompt) :]
        texts.append([*new[:10], 299, *new[11:20], 298, *new[20:30], *new[31:]])
    loop = decode(engine, PROMPTS, AlignedCopyDrafter("copy", lambda r: texts[r.row]), max_new_tokens=50)
    assert tokens_of(loop) == plain
    assert all(text.verify_calls <= 12 for text in loop.sequences)


@pytest.mark.parametrize(("reads", "shape"), [(True, (64,)), (False, (0,))])
def test_hidden_states_are_fetched_for_whom_reads_them(engine: OnnxRuntimeEngine, reads: bool, shape: tuple[int, ...]) -> None:
    class Reader(RandomTrees):
        reads_hidden = reads

        def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
            found.update(request.hidden.shape for request in requests)
            return super().propose(requests)

    found: set[tuple[int, ...]] = set()
    decode(engine, PROMPTS[:1], Reader([[0] * 99]), max_new_tokens=8)
    assert found == {shape}


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
    loop = decode(engine, PROMPTS[:1], drafter, max_new_tokens=41, draft_nodes=4, sampling=sampling)
    assert loop.sequences[0].verify_calls <= 9  # 8 when rounding never tips a test


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
    loop = decode(engine, PROMPTS, RandomTrees(plain), max_new_tokens=count)
    assert [text.new_tokens for text in loop.sequences] == [count] * 3
    assert {text.finish_reason for text in loop.sequences} == {"length"}


def test_end_token_inside_an_accepted_run(engine: OnnxRuntimeEngine) -> None:
    plain = tokens_of(decode(engine, PROMPTS, max_new_tokens=50))
    new = plain[0][len(PROMPTS[0]) :]
    end = next(token for i, token in enumerate(new) if i > 8 and token not in new[:i])
    wanted = new[: new.index(end) + 1]
    for drafter in (None, RandomTrees(plain), DraftModelDrafter("draft_model", engine)):
        loop = decode(engine, PROMPTS[:1], drafter, max_new_tokens=50, end_tokens=frozenset({end}))
        assert loop.sequences[0].token_ids[len(PROMPTS[0]) :] == wanted
        assert loop.sequences[0].finish_reason == "end_token"


def test_generation_stops_cleanly_at_the_end_of_the_cache(engine: OnnxRuntimeEngine) -> None:
    prompt = np.random.default_rng(0).integers(3, 300, 230).tolist()
    plain = decode(engine, [prompt], max_new_tokens=100)
    assert plain.sequences[0].finish_reason == "cache_full"
    assert len(plain.sequences[0].token_ids) == engine.model.max_cache == 256
    drafted = decode(engine, [prompt], RandomTrees(tokens_of(plain)), max_new_tokens=100)
    assert tokens_of(drafted) == tokens_of(plain)
    assert drafted.sequences[0].finish_reason == "cache_full"


def test_prompts_that_cannot_be_decoded(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(PromptError, match="empty"):
        decode(engine, [[]])
    with pytest.raises(PromptError, match="256 tokens"):
        decode(engine, [[5] * 256])
    with pytest.raises(OptionError, match="max_new_tokens"):
        decode(engine, PROMPTS, max_new_tokens=0)
    with pytest.raises(OptionError, match="draft_nodes"):
        decode(engine, PROMPTS, draft_nodes=64)

"""Is the bundle what it claims to be? Three comparisons, each of which can fail.

1. The engine against the golden outputs the exporter recorded (always).
2. The engine against the checkpoint in torch (when one is given).
3. Speculative against plain decoding, for every drafter, token by token.

A first divergence is a *tie* when the two best logits lie closer than rounding can tell apart, and a *fault* otherwise:
the masked columns of a tree change the order of summation by about 1e-6, and where activations are rounded to integers
such a change can move a value to the next integer. How much that moves logits is measured on the engine at hand, so ties
are named, and anything else is a bug.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.exporter.build import LIMITS
from headstart.exporter.comparison import all_logits, compare_greedy, top_two_margin
from headstart.exporter.golden import Texts, read_golden
from headstart.runtime.engine import MAX_ROWS, Engine
from headstart.runtime.errors import OptionError, missing_extra
from headstart.runtime.generation import Prompt
from headstart.runtime.model import ARRAYS, Model, load
from headstart.runtime.prefill import open_cache, prefill
from headstart.runtime.tree import ROOT, DraftTree, chain

# Largest |Δlogit| allowed, relative to the row's logit range (max - min), where only the order of summation differs.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 8e-2}
DECOYS = (1, 2, 4, 8)  # sizes of the branch that stands before the right one when a tree's noise is measured
Progress = Callable[[str, int, int], None]  # what, done, of


@dataclass(frozen=True)
class LogitCheck:
    """The engine's logits against a reference; differences relative to each row's logit range."""

    reference: str  # "golden" or the checkpoint's folder
    rows: int
    max_abs_difference: float
    max_relative_difference: float
    median_relative_difference: float
    greedy_equal: int
    greedy_of: int
    ties: int
    faults: int

    @property
    def ok(self) -> bool:
        return self.faults == 0


@dataclass(frozen=True)
class Divergence:
    """Where speculative and plain decoding first differ on one prompt."""

    prompt: int
    token: int  # index among the new tokens
    plain: int  # token ids
    speculative: int
    margin: float  # between the two best logits of plain decoding there
    kind: str  # "tie" or "fault"


@dataclass(frozen=True)
class DrafterCheck:
    """Speculative against plain greedy decoding with one drafter."""

    drafter: str
    prompts: int
    tokens: int
    acceptance_length: float
    divergences: tuple[Divergence, ...]

    @property
    def ok(self) -> bool:
        return all(d.kind == "tie" for d in self.divergences)


@dataclass(frozen=True)
class Report:
    """The outcome of `verify`."""

    logits: tuple[LogitCheck, ...]
    drafters: tuple[DrafterCheck, ...]
    tree_noise: float  # largest |Δlogit| over the logits' range that other branches of a tree cause

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.logits) and all(check.ok for check in self.drafters)


def verify(
    bundle: str | Path,
    prompts: Sequence[Prompt] = (),
    max_new_tokens: int = 128,
    checkpoint: str | Path | None = None,
    draft_model: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = lambda what, done, of: None,
) -> Report:
    """Run the three comparisons. With no prompts, the golden inputs' texts serve as prompts.

    Raises BundleError, OptionError, MissingExtraError; a difference is not raised but reported.
    """
    model = load(bundle, device, draft_model=draft_model)
    if checkpoint is not None and model.bundle.manifest.quantization:
        raise OptionError(
            "--checkpoint compares exported logits with the checkpoint's, and this bundle's weights are quantized. "
            "Fix: leave it out, or verify the float32 bundle."
        )
    if checkpoint is not None and model.bundle.manifest.model.source == "states":
        raise OptionError(
            f"--checkpoint needs sources, and {bundle} is an assistant, which reads encoder states. Fix: leave it out."
        )
    golden = read_golden(model.bundle)
    logits = [check_golden(model.engine, golden)]
    progress("golden outputs", 1, 1)
    if checkpoint is not None:
        logits.append(check_checkpoint(model.engine, checkpoint, golden["input_ids"], golden.get("sources")))
        progress("checkpoint", 1, 1)
    texts = [*prompts] or golden_prompts(model, golden)
    noise = tree_noise(model.engine, golden["input_ids"], golden.get("sources"))
    tolerance = max(noise, TOLERANCE[model.engine.model.dtype])
    if not model.engine.exact:
        # One value that is rounded the other way sets off others behind it: the result is then another draw of the rounding
        # noise, which is seldom, so that `noise` may have missed it. Its size is what rounding does to a typical row.
        tolerance = max(tolerance, logits[0].median_relative_difference)
    return Report(tuple(logits), tuple(check_drafters(model, texts, max_new_tokens, tolerance, progress)), noise)


def golden_prompts(model: Model, golden: dict[str, NDArray[Any]]) -> list[Prompt]:
    """The golden inputs, or what the encoder reads beside them, in the form that `generate` takes."""
    if model.bundle.manifest.model.source in ARRAYS:
        return list(golden["sources"])
    return [model.tokenizer.decode(ids) for ids in golden.get("sources", golden["input_ids"]).tolist()]


def check_golden(engine: Engine, golden: dict[str, NDArray[Any]]) -> LogitCheck:
    """All rows' top logits, and greedy continuations, against those recorded at export."""
    differences = []
    texts = Texts(golden["input_ids"], golden.get("sources"))
    for (ids, source), top_ids, top_logits in zip(texts.pairs(), golden["top_ids"], golden["top_logits"], strict=True):
        ours = np.take_along_axis(all_logits(engine, ids, source), top_ids.astype(np.int64), axis=-1)
        differences.append(np.abs(ours - top_logits).max(axis=-1))
    return _logit_check("golden", engine, np.stack(differences), golden["spread"], texts, golden["greedy"])


def check_checkpoint(
    engine: Engine, checkpoint: str | Path, input_ids: NDArray[np.int64], sources: NDArray[Any] | None = None
) -> LogitCheck:
    """Every logit, and greedy continuations, against the checkpoint run by transformers in float32."""
    try:
        from headstart.exporter.checkpoint import load_checkpoint
        from headstart.exporter.golden import GREEDY, reference_greedy, reference_logits
    except ModuleNotFoundError as error:
        raise missing_extra(error, "Comparing with a checkpoint") from error
    model = load_checkpoint(checkpoint).model
    reference = reference_logits(model, input_ids, sources)
    if reference.shape[-1] != engine.model.vocab_size:
        raise OptionError(
            f"{checkpoint} has {reference.shape[-1]} logits, the bundle {engine.model.vocab_size}: another model."
        )
    texts = Texts(input_ids, sources)
    ours = [all_logits(engine, ids, source) for ids, source in texts.pairs()]
    differences = np.stack([np.abs(o - r).max(axis=-1) for o, r in zip(ours, reference, strict=True)])
    tokens = min(GREEDY, engine.model.max_cache - input_ids.shape[1])
    greedy = reference_greedy(model, input_ids, tokens, sources)
    spread = reference.max(axis=-1) - reference.min(axis=-1)
    return _logit_check(str(checkpoint), engine, differences, spread, texts, greedy)


def _logit_check(
    reference: str,
    engine: Engine,
    differences: NDArray[np.float32],  # [N, T]
    spread: NDArray[np.float32],  # [N, T]
    texts: Texts,
    greedy: NDArray[np.int64],  # [N, tokens]
) -> LogitCheck:
    relative = float((differences / spread).max())
    tolerance = logit_tolerance(engine)
    pairs = zip(texts.pairs(), greedy, strict=True)
    runs = [compare_greedy(engine, ids.tolist(), wanted.tolist(), source) for (ids, source), wanted in pairs]
    ties = sum(1 for margin in runs if margin is not None and margin <= 2 * tolerance)
    faults = sum(1 for margin in runs if margin is not None) - ties + int(relative > tolerance)
    equal = sum(1 for margin in runs if margin is None)
    median = float(np.median(differences / spread))
    return LogitCheck(reference, differences.size, float(differences.max()), relative, median, equal, len(runs), ties, faults)


def logit_tolerance(engine: Engine) -> float:
    """Largest |Δlogit| over the row's range that the engine may be off its golden outputs by."""
    return TOLERANCE[engine.model.dtype] if engine.exact else LIMITS["integer"]


def tree_noise(engine: Engine, input_ids: NDArray[np.int64], sources: NDArray[Any] | None = None) -> float:
    """How far logits move, over their range, when other branches stand before a path: the largest seen on [N, T] texts."""
    half = input_ids.shape[1] // 2
    worst = 0.0
    for ids, source in Texts(input_ids, sources).pairs():
        path = ids[half:]
        chain_logits = _behind(engine, ids[:half], chain(path[1:].tolist(), [0.0] * (len(path) - 1)), int(path[0]), source)
        spread = np.ptp(chain_logits[1:], axis=-1)
        for decoys in DECOYS:
            logits = _behind(engine, ids[:half], _behind_decoys(ids[:decoys], path[1:]), int(path[0]), source)
            difference = np.abs(logits[1 + decoys :] - chain_logits[1:]).max(axis=-1)
            worst = max(worst, float((difference / spread).max()))
    return worst


def _behind_decoys(decoys: NDArray[np.int64], path: NDArray[np.int64]) -> DraftTree:
    """A tree of two branches, the path behind the decoys."""
    parents = [ROOT, *range(len(decoys) - 1), ROOT, *range(len(decoys), len(decoys) + len(path) - 1)]
    return DraftTree(np.concatenate([decoys, path]), np.array(parents, np.int64), np.zeros(len(parents), np.float32))


def _behind(
    engine: Engine, history: NDArray[np.int64], tree: DraftTree, root: int, source: NDArray[Any] | None
) -> NDArray[np.float32]:
    """[1 + nodes, V] logits of a root and its tree behind some history."""
    cache = open_cache(engine, len(history) + MAX_ROWS, source)
    prefill(engine, cache, history.tolist())
    rows = np.arange(len(tree) + 1)[None]
    ids = np.array([[root, *tree.token_ids]], np.int64)
    mask = tree.ancestor_mask()[None]
    return np.array(engine.forward(cache, ids, len(history) + tree.depths()[None], mask, rows).logits[0])


def check_drafters(
    model: Model, prompts: Sequence[Prompt], max_new_tokens: int, tolerance: float, progress: Progress
) -> list[DrafterCheck]:
    """Each prompt decoded plainly once and with every drafter, greedy; continuations go on past end tokens.

    `tolerance`: by how much of their range the logits of two runs may differ from rounding alone.
    """
    settings = {"max_new_tokens": max_new_tokens, "ignore_end": not model.answers}
    plain = []
    for done, prompt in enumerate(prompts):
        plain.append(model.generate(prompt, drafter="none", **settings))
        progress("plain", done + 1, len(prompts))
    checks = []
    for name in model.drafters:
        results = []
        for done, prompt in enumerate(prompts):
            results.append(model.generate(prompt, drafter=name, **settings))
            progress(name, done + 1, len(prompts))
        found = [
            _divergence(model, index, prompt, p.token_ids, r.token_ids, tolerance)
            for index, (prompt, p, r) in enumerate(zip(prompts, plain, results, strict=True))
        ]
        tokens = sum(len(r.token_ids) for r in results)
        calls = sum(r.stats.verify_calls for r in results)
        length = (tokens - len(results)) / max(calls, 1)
        checks.append(DrafterCheck(name, len(prompts), tokens, length, tuple(d for d in found if d is not None)))
    return checks


def _divergence(
    model: Model, index: int, prompt: Prompt, plain: list[int], speculative: list[int], tolerance: float
) -> Divergence | None:
    if plain == speculative:
        return None
    both = zip(plain, speculative, strict=False)
    first = next((i for i, (a, b) in enumerate(both) if a != b), min(len(plain), len(speculative)))
    source, start = model.inputs(prompt)
    token_ids = start + plain[:first]
    logits = prefill(model.engine, open_cache(model.engine, len(token_ids), source), token_ids).logits[0, 0]
    margin = top_two_margin(logits)
    tie = margin <= 2 * tolerance * float(logits.max() - logits.min())  # both of the two best logits may have moved
    one_ended = first >= min(len(plain), len(speculative))
    ids = [tokens[first] if first < len(tokens) else -1 for tokens in (plain, speculative)]
    return Divergence(index, first, ids[0], ids[1], margin, "tie" if tie and not one_ended else "fault")

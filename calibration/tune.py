"""Tuning: measure the engine and the drafters on this machine, and keep what pays.

1. t(n): the time of a verify pass over 1 … 64 rows, behind a short and a long history.
2. Acceptance: each drafter proposes generous trees on the user's prompts; for every node whose parent was accepted, was it?
3. Proof: each drafter decodes the prompts with its budget, interleaved with plain decoding. The fastest is chosen; where
   none beats plain decoding the choice is "none", with the figures that say so.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.budget import Standing, VerifyCost
from headstart.runtime.bundle import Bundle
from headstart.runtime.cache import KVCache
from headstart.runtime.documents import to_json
from headstart.runtime.drafters.base import DraftRequest, TunedDrafter
from headstart.runtime.engine import MAX_ROWS, Engine
from headstart.runtime.errors import OptionError, OutputError
from headstart.runtime.generation import Prompt
from headstart.runtime.loop import DecodingLoop, LoopOptions
from headstart.runtime.model import Model, load, with_rates
from headstart.runtime.output import atomic_write
from headstart.runtime.prefill import open_cache
from headstart.runtime.tree import ROOT, DraftTree
from headstart.runtime.tuning import TUNING_SCHEMA, DrafterTuning, Tuning, fingerprint, tuning_file

Progress = Callable[[str, int, int], None]  # what, done, of
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SHORT_HISTORY, LONG_HISTORY = 64, 2048  # tokens
COST_ROUNDS, COST_WARM_UP, COST_REPEATS = 7, 3, 7  # interleaved rounds, and forwards of each
OBSERVED_NODES = 32  # of the trees whose acceptance is counted
PRIOR_WEIGHT = 6.0  # observations that a prior counts as
PROOF_ROUNDS = 3
MARGIN = 1.02  # a drafter is chosen when it is at least this much faster than plain decoding


@dataclass(frozen=True)
class TuneOptions:
    """How long to measure: tokens per prompt, and the most nodes a budget may ask for."""

    max_new_tokens: int = 128
    max_nodes: int = 47

    def __post_init__(self) -> None:
        if self.max_new_tokens < 16:
            raise OptionError(f"--max-new-tokens {self.max_new_tokens} is too few to tune on: at least 16 are needed.")
        if not 1 <= self.max_nodes < MAX_ROWS:
            raise OptionError(f"--max-nodes must lie between 1 and {MAX_ROWS - 1}, got {self.max_nodes}.")


def tune(
    bundle: str | Path,
    prompts: Sequence[Prompt],
    device: str = "cpu",
    threads: int | None = None,
    draft_model: str | Path | None = None,
    options: TuneOptions | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, of: None,
) -> Tuning:
    """Measure, choose, and write `tuning/<device>.json` inside the bundle.

    `draft_model`: another bundle, measured beside the bundle's own drafters; "auto" then wants it whenever it was chosen.

    Raises OptionError without prompts, OutputError when it was tuned already (unless `force`), BundleError, EngineError.
    """
    options = options or TuneOptions()
    opened, file = new_tuning(bundle, device, prompts, force)
    model = load(bundle, device, threads, draft_model, tuned=False)
    cost = verify_cost(model.engine, progress, model.inputs(prompts[0])[0])
    drafters = observed(model, prompts, options, progress)
    if "draft_model" in drafters:
        drafters["draft_model"] = as_deep_as_pays(drafters["draft_model"], cost)
    drafters |= drafter_pairs(drafters)
    engine = model.engine
    made = Tuning(
        schema_version=TUNING_SCHEMA,
        device=device,
        fingerprint=fingerprint(opened, engine.built[0] if engine.built else None, engine.threads),
        verify=cost,
        drafters=drafters,
        chosen="none",
        reason="",
        max_nodes=options.max_nodes,
        prompts=len(prompts),
    )
    made = _prove(model, made, prompts, options, progress)
    file.parent.mkdir(exist_ok=True)
    atomic_write(file, to_json(made))
    return made


def new_tuning(bundle: str | Path, device: str, prompts: Sequence[Prompt], force: bool) -> tuple[Bundle, Path]:
    """(the bundle, the file to write). Raises OptionError without prompts, OutputError when it is there (unless `force`)."""
    if not prompts:
        raise OptionError(
            "Tuning, measured or simulated, needs prompts of the kind that will be decoded. "
            "Fix: --data FILE, one prompt a line, or JSONL."
        )
    opened = Bundle.load(bundle)
    file = tuning_file(opened, device)
    if file.exists() and not force:
        raise OutputError(f"{file} exists and is not overwritten. Fix: --force.")
    return opened, file


def verify_cost(engine: Engine, progress: Progress, source: NDArray[Any] | None = None) -> VerifyCost:
    """t(n), medians over interleaved rounds so that a noisy moment hits all sizes alike. `source`: what an encoder reads."""
    longest = max(SHORT_HISTORY, min(LONG_HISTORY, engine.model.max_cache - MAX_ROWS))
    histories = (min(SHORT_HISTORY, longest // 2), longest)
    caches = {history: open_cache(engine, history + MAX_ROWS, source) for history in histories}
    seconds: dict[tuple[int, int], list[float]] = {}
    for done in range(COST_ROUNDS):
        for history, cache in caches.items():
            cache.lengths[:] = history
            for rows in ROWS:
                seconds.setdefault((history, rows), []).append(_time_forward(engine, cache, rows))
        progress("verify cost", done + 1, COST_ROUNDS)
    table = np.array([[1000 * statistics.median(seconds[history, rows]) for rows in ROWS] for history in histories])
    rising = np.minimum.accumulate(table[:, ::-1], axis=1)[:, ::-1]  # more rows never cost less: what says so is noise
    return VerifyCost(ROWS, histories, tuple(tuple(map(float, line)) for line in rising))


def _time_forward(engine: Engine, cache: KVCache, rows: int) -> float:
    """Seconds of one forward of a chain: the median of a few behind a warm-up."""
    positions = int(cache.lengths[0]) + np.arange(rows)[None]
    ids, mask = np.arange(rows)[None] % engine.model.vocab_size, np.tri(rows, dtype=np.bool_)[None]
    times = []
    for _ in range(COST_WARM_UP + COST_REPEATS):
        started = time.perf_counter()
        engine.forward(cache, ids, positions, mask, np.arange(rows)[None]).wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times[COST_WARM_UP:])


class Recorder:
    """A drafter that lets another propose, and counts which of its nodes the target then took.

    The text of the next request tells: it continues along the accepted path. Nodes are counted where their parent was
    accepted, which is when their own acceptance was decided.
    """

    def __init__(self, inner: TunedDrafter) -> None:
        self.name, self.default_nodes, self.reads_hidden = inner.name, inner.default_nodes, inner.reads_hidden
        self._inner = inner
        self.seen = np.zeros(inner.class_count)
        self.accepted = np.zeros(inner.class_count)
        self.seconds: list[float] = []
        self._last: dict[int, tuple[DraftTree, int]] = {}

    def open(self, batch: int) -> None:
        self._inner.open(batch)
        self._last = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[DraftTree]:
        for request in requests:
            self.settle(request.row, request.token_ids)
        started = time.perf_counter()
        trees = self._inner.propose(requests)
        self.seconds.append(time.perf_counter() - started)
        for request, tree in zip(requests, trees, strict=True):
            self._last[request.row] = tree, len(request.token_ids)
        return trees

    def settle(self, row: int, token_ids: Sequence[int]) -> None:
        """Count the nodes of the row's last tree against what the text became."""
        tree, known = self._last.pop(row, (None, 0))
        if tree is None or tree.classes is None:
            return
        children, parent = tree.children(), ROOT
        for token in token_ids[known:]:
            following = ROOT
            for node in children[parent + 1]:
                self.seen[tree.classes[node]] += 1
                if tree.token_ids[node] == token:
                    self.accepted[tree.classes[node]] += 1
                    following = node
            if following == ROOT:
                return
            parent = following

    def rates(self) -> tuple[float, ...]:
        """Acceptance per class, drawn towards the prior where little was seen."""
        prior = np.array(self._inner.prior_rates())
        return tuple(map(float, (self.accepted + PRIOR_WEIGHT * prior) / (self.seen + PRIOR_WEIGHT)))


def observed(model: Model, prompts: Sequence[Prompt], options: TuneOptions, progress: Progress) -> dict[str, DrafterTuning]:
    """What each drafter's nodes are worth, and what its proposals cost here."""
    plain_ms = other_ms_per_round(decode(model, None, prompts[0], LoopOptions(options.max_new_tokens)))
    drafters = tuned_drafters(model)
    return {name: _observe(model, inner, prompts, options, plain_ms, progress) for name, inner in drafters.items()}


def _observe(
    model: Model, inner: TunedDrafter, prompts: Sequence[Prompt], options: TuneOptions, plain_ms: float, progress: Progress
) -> DrafterTuning:
    """Decode the prompts with generous trees, and count.

    What a round takes beside verifying, over what a plain round does (`plain_ms`), is part of the draft's price.
    """
    recorder = Recorder(inner)
    calls = tokens = 0
    other_ms = []
    for done, prompt in enumerate(prompts):
        loop = decode(model, recorder, prompt, LoopOptions(options.max_new_tokens, draft_nodes=OBSERVED_NODES))
        text = loop.sequences[0]
        recorder.settle(0, text.token_ids)
        calls, tokens = calls + text.verify_calls, tokens + text.new_tokens - 1
        other_ms.append(other_ms_per_round(loop))
        progress(inner.name, done + 1, len(prompts))
    draft_ms = 1000 * statistics.median(recorder.seconds) if recorder.seconds else 0.0
    draft_ms += max(0.0, statistics.median(other_ms) - plain_ms)
    return DrafterTuning(recorder.rates(), draft_ms, tokens / max(calls, 1), 0.0)


def other_ms_per_round(loop: DecodingLoop) -> float:
    """Milliseconds per round that are neither drafting nor verifying: accepting, committing, Python."""
    clock = loop.clock
    return 1000 * (clock.decode_s - clock.draft_s - clock.verify_s) / max(loop.sequences[0].verify_calls, 1)


def as_deep_as_pays(found: DrafterTuning, cost: VerifyCost) -> DrafterTuning:
    """A draft model's rates up to the depth with the most tokens per second, and zeros beyond: each node costs a step."""
    step_ms, curve = found.draft_ms / OBSERVED_NODES, cost.curve(cost.histories[0])
    tokens = 1 + np.cumsum(np.cumprod(found.rates))
    depths = np.arange(1, min(len(tokens), OBSERVED_NODES) + 1)
    best = int(depths[(tokens[: len(depths)] / (curve[1 + depths] + depths * step_ms)).argmax()])
    rates = (*found.rates[:best], *(0.0,) * (len(found.rates) - best))
    return dataclasses.replace(found, rates=rates, draft_ms=best * step_ms)


def decode(model: Model, drafter: TunedDrafter | Recorder | None, prompt: Prompt, options: LoopOptions) -> DecodingLoop:
    """Decode one prompt to its end."""
    if model.answers:
        options = dataclasses.replace(options, end_tokens=frozenset(model.bundle.manifest.generation.eos_token_ids))
    source, start = model.inputs(prompt)
    loop = DecodingLoop(model.engine, drafter, [start], options, [] if source is None else [source])
    for _ in loop.rounds():
        pass
    return loop


COPIES = ("source_copy", "ngram")  # cost next to nothing, and are right either often or hardly ever: asked first in a pair


def drafter_pairs(drafters: dict[str, DrafterTuning]) -> dict[str, DrafterTuning]:
    """A copy with each other drafter behind it, which is asked where the copy promises less than that one brings."""
    pairs = {}
    for i, first in enumerate(COPIES):
        for second in drafters:
            if first in drafters and second not in COPIES[: i + 1]:
                copy, other = drafters[first], drafters[second]
                rates, draft_ms = (*copy.rates, *other.rates), copy.draft_ms + other.draft_ms
                pairs[f"{first}+{second}"] = DrafterTuning(rates, draft_ms, 0.0, 0.0, other.acceptance_length)
    return pairs


def _prove(model: Model, tuning: Tuning, prompts: Sequence[Prompt], options: TuneOptions, progress: Progress) -> Tuning:
    """Decode with each budget and without, interleaved; fill in what came of it, and choose."""
    single = tuned_drafters(model)
    drafters = {name: with_rates(single, name, found) for name, found in tuning.drafters.items()}
    seconds: dict[str, list[float]] = {"none": [], **{name: [] for name in drafters}}
    settings = {name: _budgeted(tuning, name, options) for name in seconds}
    lengths: dict[str, float] = {}
    for done in range(PROOF_ROUNDS):
        for name in seconds:
            loops = [decode(model, drafters.get(name), p, settings[name]) for p in prompts]
            seconds[name].append(sum(loop.clock.decode_s for loop in loops))
            calls = sum(loop.sequences[0].verify_calls for loop in loops)
            lengths[name] = sum(loop.sequences[0].new_tokens - 1 for loop in loops) / max(calls, 1)
        progress("proof", done + 1, PROOF_ROUNDS)
    speedups = {
        name: statistics.median(plain / mine for plain, mine in zip(seconds["none"], times, strict=True))
        for name, times in seconds.items()
    }
    found = {
        name: dataclasses.replace(one, acceptance_length=lengths[name], speedup=speedups[name])
        for name, one in tuning.drafters.items()
    }
    chosen, reason = choice({name: speedups[name] for name in found})
    return dataclasses.replace(tuning, drafters=found, chosen=chosen, reason=reason)


def choice(speedups: Mapping[str, float]) -> tuple[str, str]:
    """(the fastest drafter, or "none" where none beats plain decoding; why), from tokens/s over plain decoding's."""
    best = max(speedups, key=lambda name: speedups[name], default="none")
    chosen = best if speedups.get(best, 0.0) >= MARGIN else "none"
    listed = ", ".join(f"{name} {speedup:.2f} ×" for name, speedup in speedups.items())
    verdict = f"{best} is fastest" if chosen != "none" else f"nothing reaches {MARGIN} × plain decoding"
    return chosen, f"{verdict}: {listed or 'no drafter'}"


def tuned_drafters(model: Model) -> dict[str, TunedDrafter]:
    """The model's drafters that believe rates."""
    found = {name: model.drafter(name) for name in model.drafters}
    return {name: drafter for name, drafter in found.items() if isinstance(drafter, TunedDrafter)}


def _budgeted(tuning: Tuning, name: str, options: TuneOptions) -> LoopOptions:
    standing = Standing()
    return LoopOptions(options.max_new_tokens, budgets=lambda: tuning.budget(name, standing))

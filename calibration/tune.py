"""Tuning: measure the engine and the drafters on this machine, and keep what pays.

1. t(B, n): the time of a verify pass over 1 … 64 rows, after a short and a long history, for one sequence and for batches.
2. Acceptance: each drafter proposes generous trees on the user's prompts; how many nodes are accepted, given their parents?
3. Proof: each drafter decodes the prompts with its budget, interleaved with plain decoding. The fastest is chosen; where
   none beats plain decoding the choice is "none", with the figures that say so.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.budget import Budget, DrafterStats
from headstart.runtime.bundle import Bundle
from headstart.runtime.documents import to_json
from headstart.runtime.drafters.base import Drafter, DraftRequest, DraftSequence, Features, Target
from headstart.runtime.drafters.shortlist import ShortlistDrafter
from headstart.runtime.errors import OptionError, OutputError
from headstart.runtime.graph import MAX_ROWS, Engine, SplitDecoder
from headstart.runtime.loading import load, use_provisional_cost, with_rates
from headstart.runtime.model import Model, Prompt
from headstart.runtime.output import atomic_write
from headstart.runtime.prefill import decoder_inputs
from headstart.runtime.scheduler import Scheduler, decode_alone
from headstart.runtime.sequence import Request, Sequence
from headstart.runtime.states import State
from headstart.runtime.tree import ROOT, DraftTree
from headstart.runtime.tuning import TUNING_SCHEMA, DrafterTuning, Tuning, fingerprint, tuning_file
from headstart.runtime.verify_cost import BatchCost, VerifyCost

Progress = Callable[[str, int, int], None]  # what, done, of
PassInputs = Mapping[str, NDArray[np.int64]]  # see prefill.decoder_inputs
RunPass = Callable[[State, PassInputs, NDArray[np.bool_]], None]
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
BATCHES, BATCH_ROWS = (2, 8), (1, 2, 4, 8, 16)  # of batches, which are measured more coarsely
SHORT_HISTORY, LONG_HISTORY = 64, 2048  # tokens
COST_ROUNDS, BATCH_ROUNDS, COST_WARM_UP, COST_REPEATS = 7, 3, 1, 3  # interleaved rounds, and passes of each
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
    prompts: Items[Prompt],
    device: str = "cpu",
    threads: int | None = None,
    draft_model: str | Path | None = None,
    options: TuneOptions | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, of: None,
) -> Tuning:
    """Measure, choose, and write `tuning/<device>.json` inside the bundle.

    `draft_model`: another bundle, measured with the bundle's own drafters; "auto" then needs it whenever it was chosen.

    Raises OptionError without prompts, OutputError when it was tuned already (unless `force`), BundleError, EngineError.
    """
    options = options or TuneOptions()
    opened, file = new_tuning(bundle, device, prompts, force)
    model = load(bundle, device, threads, draft_model, tuned=False)
    source = model.input(prompts[0]).source
    cost = verify_cost(model.engine, progress, source)
    provisional = provisional_cost(model, progress, source)
    drafters, node_ms = observed(model, prompts, options, progress)
    cost, provisional = cost.with_nodes(node_ms), provisional.with_nodes(node_ms) if provisional is not None else None
    use_provisional_cost(model.generator.drafters, provisional)
    if "draft_model" in drafters:
        drafters["draft_model"] = as_deep_as_pays(drafters["draft_model"], cost)
    listed = [name for name in drafters if isinstance(model.generator.drafters[name], ShortlistDrafter)]
    drafters |= drafter_pairs(drafters, listed)
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
        provisional=provisional,
    )
    made = _prove(model, made, prompts, options, progress)
    file.parent.mkdir(exist_ok=True)
    atomic_write(file, to_json(made))
    return made


def new_tuning(bundle: str | Path, device: str, prompts: Items[Prompt], force: bool) -> tuple[Bundle, Path]:
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
    """t(B, n), medians over interleaved rounds so that noise affects all sizes alike. `source`: what an encoder reads."""
    batches = [1, *(batch for batch in BATCHES if batch <= Scheduler(engine).max_batch)]
    run = partial(_whole_pass, engine)
    return VerifyCost(tuple(_batch_cost(engine, run, batch, progress, source) for batch in batches))


def provisional_cost(model: Model, progress: Progress, source: NDArray[Any] | None = None) -> VerifyCost | None:
    """t(1, n) of passes that a short list decides; None for a bundle without one."""
    listed = next((drafter for drafter in model.generator.drafters.values() if isinstance(drafter, ShortlistDrafter)), None)
    decoder = model.engine.graph("decoder")
    if listed is None or not isinstance(decoder, SplitDecoder):
        return None
    run = partial(_provisional_pass, decoder, listed)
    return VerifyCost((_batch_cost(model.engine, run, 1, progress, source, "provisional cost"),))


def _batch_cost(
    engine: Engine,
    run: RunPass,
    batch: int,
    progress: Progress,
    source: NDArray[Any] | None,
    what: str = "verify cost",
) -> BatchCost:
    rows = ROWS if batch == 1 else BATCH_ROWS
    longest = max(SHORT_HISTORY, min(LONG_HISTORY, engine.model.max_cache - MAX_ROWS))
    histories = (min(SHORT_HISTORY, longest // 2), longest)
    states = {history: _state_for(engine, batch, history, source) for history in histories}
    seconds: dict[tuple[int, int], list[float]] = {}
    rounds = COST_ROUNDS if batch == 1 else BATCH_ROUNDS
    for done in range(rounds):
        for history, state in states.items():
            state.lengths[:] = history
            for count in rows:
                seconds.setdefault((history, count), []).append(_time_pass(engine, run, state, count))
        progress(f"{what}, batch {batch}", done + 1, rounds)
    table = np.array([[1000 * statistics.median(seconds[history, count]) for count in rows] for history in histories])
    rising = np.minimum.accumulate(table[:, ::-1], axis=1)[:, ::-1]  # more rows never cost less: what says so is noise
    return BatchCost(batch, rows, histories, tuple(tuple(map(float, line)) for line in rising))


def _state_for(engine: Engine, batch: int, history: int, source: NDArray[Any] | None) -> State:
    state = engine.graph("decoder").new_state(batch, history + MAX_ROWS)
    if source is not None:
        sources = engine.encode([source])
        for row in range(batch):
            state.put_sources(row, sources)
    return state


def _whole_pass(engine: Engine, state: State, given: PassInputs, mask: NDArray[np.bool_]) -> None:
    engine.graph("decoder").run(given, state, mask).wait()


def _provisional_pass(
    decoder: SplitDecoder, listed: ShortlistDrafter, state: State, given: PassInputs, mask: NDArray[np.bool_]
) -> None:
    outputs = decoder.run_body(given, state, mask)
    listed.logits(outputs.rows(contract.HIDDEN, 0, range(mask.shape[1])))


def _time_pass(engine: Engine, run: RunPass, state: State, rows: int) -> float:
    """Seconds of one pass over chains: the median of a few after a warm-up."""
    shape = state.batch, rows
    ids, chosen = np.broadcast_to(np.arange(rows) % engine.model.vocab_size, shape), np.broadcast_to(np.arange(rows), shape)
    positions, mask = state.lengths[:, None] + np.arange(rows), np.broadcast_to(np.tri(rows, dtype=np.bool_), (*shape, rows))
    times, given = [], decoder_inputs(ids, positions, chosen)
    for _ in range(COST_WARM_UP + COST_REPEATS):
        started = time.perf_counter()
        run(state, given, mask)
        times.append(time.perf_counter() - started)
    return statistics.median(times[COST_WARM_UP:])


class Recorder:
    """A drafter that lets another propose, and counts which of its nodes the target then accepted.

    The text of the next request tells: it continues along the accepted path. Nodes are counted where their parent was
    accepted, which is when their own acceptance was decided.
    """

    def __init__(self, inner: Drafter) -> None:
        self.name, self.default_nodes, self.class_count = inner.name, inner.default_nodes, inner.class_count
        self.reads, self.price = inner.reads, inner.price
        self.prior_rates, self.use_rates = inner.prior_rates, inner.use_rates
        self._inner = inner
        self.seen = np.zeros(inner.class_count)
        self.accepted = np.zeros(inner.class_count)
        self.seconds: list[float] = []
        self._last: dict[int, tuple[DraftTree, int]] = {}

    def open(self, sequence: DraftSequence, target: Target) -> None:
        self._inner.open(sequence, target)

    def observe(self, sequence: DraftSequence, rows: Features, path: Items[int]) -> None:
        self._inner.observe(sequence, rows, path)

    def taken_back(self, sequence: DraftSequence, known: int) -> None:
        self._inner.taken_back(sequence, known)

    def close(self, sequence: DraftSequence) -> None:
        self._settle(sequence)
        self._inner.close(sequence)

    def propose(self, requests: Items[DraftRequest]) -> list[DraftTree]:
        for request in requests:
            self._settle(request.sequence)
        started = time.perf_counter()
        trees = self._inner.propose(requests)
        self.seconds.append(time.perf_counter() - started)
        for request, tree in zip(requests, trees, strict=True):
            self._last[request.sequence.id] = tree, len(request.sequence.token_ids)
        return trees

    def _settle(self, sequence: DraftSequence) -> None:
        """Count the nodes of the sequence's last tree against the text that followed."""
        tree, known = self._last.pop(sequence.id, (None, 0))
        if tree is None or tree.classes is None:
            return
        children, parent = tree.children(), ROOT
        for token in sequence.token_ids[known:]:
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


def observed(
    model: Model, prompts: Items[Prompt], options: TuneOptions, progress: Progress
) -> tuple[dict[str, DrafterTuning], float]:
    """(what each drafter's nodes are worth and what its proposals cost here, milliseconds that the host takes for a node).

    Pairs follow from their parts.
    """
    plain_ms = other_ms_per_round(decode(model, prompts[0], options.max_new_tokens))
    single = {name: inner for name, inner in model.generator.drafters.items() if "+" not in name}
    found = {name: _observe(model, inner, prompts, options, progress) for name, inner in single.items()}
    rounds = [one for _, seen in found.values() for one in seen]
    return {name: tuned for name, (tuned, _) in found.items()}, node_cost(rounds, plain_ms)


def node_cost(rounds: Items[tuple[float, float]], plain_ms: float) -> float:
    """Milliseconds a node, by least squares over (nodes, milliseconds of a round), where none cost `plain_ms`; at least 0."""
    slope = sum(nodes * (ms - plain_ms) for nodes, ms in rounds) / max(sum(nodes**2 for nodes, _ in rounds), 1.0)
    return max(0.0, slope)


def _observe(
    model: Model, inner: Drafter, prompts: Items[Prompt], options: TuneOptions, progress: Progress
) -> tuple[DrafterTuning, list[tuple[float, float]]]:
    """Decode the prompts with generous trees, and count.

    Returns also, of each prompt, a round's nodes and its milliseconds apart from drafting and verifying.
    """
    recorder = Recorder(inner)
    calls = tokens = 0
    rounds = []
    for done, prompt in enumerate(prompts):
        sequence = decode(model, prompt, options.max_new_tokens, recorder, OBSERVED_NODES)
        calls, tokens = calls + sequence.verify_calls, tokens + sequence.new_tokens - 1
        rounds.append((sequence.drafted_tokens / max(sequence.verify_calls, 1), other_ms_per_round(sequence)))
        progress(inner.name, done + 1, len(prompts))
    draft_ms = 1000 * statistics.median(recorder.seconds) if recorder.seconds else 0.0
    return DrafterTuning(recorder.rates(), draft_ms, tokens / max(calls, 1), 0.0), rounds


def other_ms_per_round(sequence: Sequence) -> float:
    """Milliseconds per round that are neither drafting nor verifying: accepting, committing, Python."""
    clock = sequence.clock
    return 1000 * (clock.decode_s - clock.draft_s - clock.verify_s) / max(sequence.verify_calls, 1)


def as_deep_as_pays(tuned: DrafterTuning, cost: VerifyCost) -> DrafterTuning:
    """A draft model's rates up to the depth with the most tokens per second, and zeros beyond: each node costs a step."""
    step_ms, curve = tuned.draft_ms / OBSERVED_NODES, cost.single.curve(cost.single.histories[0])
    tokens = 1 + np.cumsum(np.cumprod(tuned.rates))
    depths = np.arange(1, min(len(tokens), OBSERVED_NODES) + 1)
    best = int(depths[(tokens[: len(depths)] / (curve[1 + depths] + depths * step_ms)).argmax()])
    rates = (*tuned.rates[:best], *(0.0,) * (len(tuned.rates) - best))
    return dataclasses.replace(tuned, rates=rates, draft_ms=best * step_ms)


def decode(
    model: Model,
    prompt: Prompt,
    max_new_tokens: int,
    drafter: Drafter | None = None,
    draft_nodes: int | None = None,
    budget: Budget | None = None,
    cost: VerifyCost | None = None,
) -> Sequence:
    """Decode one prompt to its end, greedily and without the model's rules. `cost`: what the budget's choices rest on."""
    given = model.input(prompt)
    request = Request(
        given.prompt_ids,
        max_new_tokens,
        end_tokens=frozenset(model.bundle.manifest.generation.eos_token_ids) if model.answers else frozenset(),
        drafter=drafter,
        draft_nodes=draft_nodes,
        budget=budget,
        source=given.source,
        source_ids=given.source_ids(model.bundle.manifest.model.source),
    )
    return decode_alone(model.engine, request, cost)


COPIES = ("source_copy", "ngram")  # cost next to nothing, and are right either often or hardly ever: asked first in a pair


def drafter_pairs(drafters: dict[str, DrafterTuning], shortlists: Items[str] = ()) -> dict[str, DrafterTuning]:
    """A copy, then each other drafter, which is asked where the copy promises less than that one brings.

    Each of these, and each drafter, also proposes the trees of passes that a short list decides.
    """
    proposers = {name: one for name, one in drafters.items() if name not in shortlists}
    pairs = {}
    for i, first in enumerate(COPIES):
        for second in proposers:
            if first in proposers and second not in COPIES[: i + 1]:
                copy, other = proposers[first], proposers[second]
                rates, draft_ms = (*copy.rates, *other.rates), copy.draft_ms + other.draft_ms
                pairs[f"{first}+{second}"] = DrafterTuning(rates, draft_ms, 0.0, 0.0, other.acceptance_length)
    decided = {f"{name}+{listed}": one for listed in shortlists for name, one in (proposers | pairs).items()}
    return pairs | decided


def _prove(model: Model, tuning: Tuning, prompts: Items[Prompt], options: TuneOptions, progress: Progress) -> Tuning:
    """Decode with each budget and without, interleaved; fill in what came of it, and choose."""
    drafters = {name: with_rates(model.generator.drafters, name, one) for name, one in tuning.drafters.items()}
    seconds: dict[str, list[float]] = {"none": [], **{name: [] for name in drafters}}
    stats = {name: DrafterStats() for name in drafters}
    lengths: dict[str, float] = {}
    for done in range(PROOF_ROUNDS):
        for name in seconds:
            budgets = [tuning.budget(name, stats[name]) if name in drafters else None for _ in prompts]
            pairs = zip(prompts, budgets, strict=True)
            runs = [
                decode(model, prompt, options.max_new_tokens, drafters.get(name), budget=budget, cost=tuning.verify)
                for prompt, budget in pairs
            ]
            seconds[name].append(sum(run.clock.decode_s for run in runs))
            lengths[name] = sum(run.new_tokens - 1 for run in runs) / max(sum(run.verify_calls for run in runs), 1)
        progress("proof", done + 1, PROOF_ROUNDS)
    speedups = {
        name: statistics.median(plain / mine for plain, mine in zip(seconds["none"], times, strict=True))
        for name, times in seconds.items()
    }
    proved = {
        name: dataclasses.replace(one, acceptance_length=lengths[name], speedup=speedups[name])
        for name, one in tuning.drafters.items()
    }
    chosen, reason = choice({name: speedups[name] for name in proved})
    return dataclasses.replace(tuning, drafters=proved, chosen=chosen, reason=reason)


def choice(speedups: Mapping[str, float]) -> tuple[str, str]:
    """(the fastest drafter, or "none" where none beats plain decoding; why), from tokens/s over plain decoding's."""
    best = max(speedups, key=lambda name: speedups[name], default="none")
    chosen = best if speedups.get(best, 0.0) >= MARGIN else "none"
    listed = ", ".join(f"{name} {speedup:.2f} ×" for name, speedup in speedups.items())
    verdict = f"{best} is fastest" if chosen != "none" else f"nothing reaches {MARGIN} × plain decoding"
    return chosen, f"{verdict}: {listed or 'no drafter'}"

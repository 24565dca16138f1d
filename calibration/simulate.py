"""Tuning for a board that is not available: acceptance measured here, costs from the roofline.

Which tokens the target accepts does not depend on the device, so the drafters decode the prompts with the CPU engine, with
budgets that assume the board's predicted costs; what each round would have cost there is added up. Everything written says
that it was simulated: `headstart tune` on the board itself replaces it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headstart.exporter.devices import Device, device_named
from headstart.exporter.heads.storage import load_head
from headstart.exporter.passes.gemm import split_gemms
from headstart.exporter.passes.linear import linears
from headstart.exporter.passes.values import dtype_of
from headstart.runtime.budget import Budget, DrafterStats
from headstart.runtime.bundle import Bundle
from headstart.runtime.documents import to_json
from headstart.runtime.errors import missing_extra
from headstart.runtime.loading import load, with_rates
from headstart.runtime.model import Model, Prompt
from headstart.runtime.output import atomic_write
from headstart.runtime.tuning import TUNING_SCHEMA, DrafterTuning, Tuning, fingerprint
from headstart.runtime.verify_cost import BatchCost, VerifyCost

from .roofline import FITTED, Coefficients, Work, pass_ms
from .tune import ROWS, Progress, TuneOptions, choice, decode, drafter_pairs, new_tuning, observed

HEAD_LAYERS = 2  # a head's launches, in layers' worth
CACHE_PASSES = 3  # of an attention layer over its cache: the plans read it, write it in their own order, and read that


@dataclasses.dataclass
class PricedBudget(Budget):
    """A budget that adds up what its rounds would cost on the board."""

    spent_ms: float = 0.0
    tokens: int = 0

    def observe(self, tokens: int, milliseconds: float, plain_milliseconds: float, drafted: bool) -> None:
        self.spent_ms += milliseconds + (self.draft_ms() if drafted else 0.0)
        self.tokens += tokens
        super().observe(tokens, milliseconds, plain_milliseconds, drafted)


def simulate(
    bundle: str | Path,
    prompts: Sequence[Prompt],
    device: str,
    threads: int | None = None,
    cache: int | None = None,
    options: TuneOptions | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, of: None,
) -> Tuning:
    """Predict, choose, and write `tuning/<device>.json`, marked as simulated. `cache`: slots the engine is built with.

    Raises OptionError for an unknown board or without prompts, OutputError when there is such a file (unless `force`).
    """
    options = options or TuneOptions()
    board = device_named(device)
    opened, file = new_tuning(bundle, device, prompts, force)
    model = load(bundle, "cpu", threads, tuned=False)
    try:
        cost = predicted_cost(opened, board, cache or opened.manifest.model.max_cache)
        heads = {name: head_ms(opened, name, board) for name in opened.manifest.heads}
    except ModuleNotFoundError as error:
        raise missing_extra(error, "Simulating") from error
    drafters, _ = observed(model, prompts, options, progress)
    drafters = {name: dataclasses.replace(one, draft_ms=heads.get(name, one.draft_ms)) for name, one in drafters.items()}
    made = Tuning(
        schema_version=TUNING_SCHEMA,
        device=device,
        fingerprint=fingerprint(opened, None, 0) | {"engine": "simulated", "processor": device},
        verify=cost,
        drafters=drafters | drafter_pairs(drafters),
        chosen="none",
        reason="",
        max_nodes=options.max_nodes,
        prompts=len(prompts),
        simulated=True,
    )
    made = _chosen(model, made, prompts, options, progress)
    file.parent.mkdir(exist_ok=True)
    atomic_write(file, to_json(made))
    return made


def predicted_cost(bundle: Bundle, device: Device, slots: int, fitted: Coefficients = FITTED) -> VerifyCost:
    """t(n) of a TensorRT engine of the bundle. An engine attends over its whole cache, so history changes nothing."""
    import onnx_ir as ir

    model, decoder = bundle.manifest.model, bundle.manifest.graphs["decoder"]
    weights = matrix_millions(ir.load(bundle.path / decoder.file), model.dtype)
    per_slot = 2 * sum(pair.kv_heads * (pair.key_size + pair.value_size) for pair in decoder.slots)
    line = tuple(pass_ms(Work(weights, rows, model.layers, CACHE_PASSES * slots * per_slot), device, fitted) for rows in ROWS)
    return VerifyCost((BatchCost(1, ROWS, (0, slots), (line, line)),))


def head_ms(bundle: Bundle, name: str, device: Device, fitted: Coefficients = FITTED) -> float:
    """A proposal of a draft head there."""
    weights = matrix_millions(load_head(bundle, name), bundle.manifest.model.dtype)
    return pass_ms(Work(weights, 1, HEAD_LAYERS), device, fitted)


def matrix_millions(model: Any, dtype: str) -> Mapping[str, float]:
    """Millions of weights that a pass multiplies by, by how an engine stores them; float32 is stored as float16."""
    model, _ = split_gemms(model)
    counts: dict[str, float] = {}
    for linear in linears(model):
        kind = dtype_of(linear.weight).name.lower() if linear.quantized else "bfloat16" if dtype == "bfloat16" else "float16"
        counts[kind] = counts.get(kind, 0.0) + float(np.prod(linear.shape)) / 1e6
    return counts


def _chosen(model: Model, made: Tuning, prompts: Sequence[Prompt], options: TuneOptions, progress: Progress) -> Tuning:
    """Decode with each budget, price the rounds, and choose."""
    found = {}
    for done, name in enumerate(made.drafters):
        found[name] = _priced(model, made, name, prompts, options)
        progress("simulation", done + 1, len(made.drafters))
    chosen, reason = choice({name: one.speedup for name, one in found.items()})
    return dataclasses.replace(made, drafters=found, chosen=chosen, reason=f"simulated for {made.device}: {reason}")


def _priced(model: Model, made: Tuning, name: str, prompts: Sequence[Prompt], options: TuneOptions) -> DrafterTuning:
    """A drafter's acceptance length and speed-up under its budget, at the board's prices."""
    one = made.drafters[name]
    drafter, stats = with_rates(model.generator.drafters, name, one), DrafterStats()
    budgets = [PricedBudget(lambda nodes, depth: one.draft_ms, made.max_nodes, stats) for _ in prompts]
    pairs, limit = zip(prompts, budgets, strict=True), options.max_new_tokens
    runs = [decode(model, prompt, limit, drafter, budget=budget, cost=made.verify) for prompt, budget in pairs]
    calls = sum(run.verify_calls for run in runs)
    tokens, spent = sum(budget.tokens for budget in budgets), sum(budget.spent_ms for budget in budgets)
    speedup = tokens * float(made.verify.curve(1, 0)[1]) / spent if spent else 0.0
    return dataclasses.replace(one, acceptance_length=tokens / max(calls, 1), speedup=speedup)

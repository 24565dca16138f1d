"""A comparison of programs: workers made ready, rounds over all of them, a table. What rivals.py and seq2seq_rivals.py share.

Which programs, prompts and columns there are comes with the task. What fails becomes a row that says so, and does not stop
the others.
"""

import hashlib
import json
import platform
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from measurement import Configuration, Prompt, Worker, WorkerError, available_mb, idle_shares, measure, warm_up
from preparation import PreparationError, Workshop, fingerprint, say
from rival_workers.protocol import Rival, Setup
from table import Truth, as_json, markdown
from task import DRAFTING, InputError, Task, pythons_from

SPINNING = 0.05  # of a core, by a worker that is not asked
LOW_MEMORY_MB = 2000  # below this, workers are stopped after each pass instead of kept
FINE, BAD_INPUT = 0, 2


@dataclass
class Station:
    """A worker and the configurations it serves."""

    worker: Worker
    rows: list[Configuration] = field(default_factory=list)
    discovered: bool = True  # False for a bundle that was not loaded yet: it has the drafters it has


def compare(arguments: Namespace, task_from: Callable[[Namespace], Task]) -> int:
    """Prepare, measure and print what was asked for; the exit code of the script."""
    try:
        task = task_from(arguments)
        shop = Workshop(arguments.work, pythons_from(arguments.python, task.rivals), arguments.threads)
        stations, failed = _stations(task, shop)
        if not stations and not failed:
            raise InputError("--only and --skip leave nothing to measure")
        if arguments.prepare_only:
            return _report_failures(failed)
        return _run(task, shop, stations, failed, arguments)
    except InputError as error:
        say(f"{Path(sys.argv[0]).name}: {error}")
        return BAD_INPUT


def _run(task: Task, shop: Workshop, stations: list[Station], failed: list[Configuration], arguments: Any) -> int:
    known = fingerprint(task.checkpoint, task.rivals[task.reference])
    truth = Truth(_reference(task, shop), task.quality)
    try:
        keep = _open(stations, task)
        rows = [row for station in stations for row in station.rows] + failed
        for number in range(arguments.rounds):
            _round(number, arguments.rounds, stations, task, keep and not arguments.fresh)
            _write_json(arguments.json, task, rows, truth)  # an interrupted run keeps its rounds
        _measure_perplexity(stations, task)  # last, for whole texts of logits are no part of a row's memory
        _write_json(arguments.json, task, rows, truth)
    except KeyboardInterrupt:
        say("interrupted: this is what was measured so far")
        rows = [row for station in stations for row in station.rows] + failed
    finally:
        for station in stations:
            station.worker.stop()
    print(markdown(rows, truth, task.columns))
    if fingerprint(task.checkpoint, task.rivals[task.reference]) != known:
        raise InputError(f"{task.checkpoint} changed during the run: programs have read different weights")
    return FINE


def _stations(task: Task, shop: Workshop) -> tuple[list[Station], list[Configuration]]:
    """Workers not yet started, and rows for what could not be prepared."""
    stations: list[Station] = []
    failed: list[Configuration] = []
    for rival in task.rivals.values():
        for weights in rival.weights:
            for modes in rival.groups:
                _add_station(task, shop, rival, weights, list(modes), stations, failed)
    for label, (bundle, draft) in task.bundles.items():
        rival = task.rivals["headstart_bundle"]
        if task.wants(f"{rival.name}/{label}"):
            setup = Setup(str(bundle.resolve()), str(draft.resolve()) if draft else None, label, task.threads, [], task.ends)
            worker = Worker(rival.name, shop.python(rival), setup, shop.log(f"{rival.name}-{label}"))
            stations.append(Station(worker, [Configuration(rival.name, rival.program, label, "plain")], discovered=False))
    return stations, failed


def _add_station(
    task: Task,
    shop: Workshop,
    rival: Rival,
    weights: str,
    modes: list[str],
    stations: list[Station],
    failed: list[Configuration],
) -> None:
    modes = [mode for mode in modes if task.wants(f"{rival.name}/{weights}/{mode}")]
    if not modes:
        return
    rows = [Configuration(rival.name, rival.program, weights, mode) for mode in modes]
    try:
        setup = _setup(task, shop, rival, weights, modes)
        worker = Worker(rival.name, shop.python(rival), setup, shop.log("-".join((rival.name, weights, modes[0]))))
        stations.append(Station(worker, rows))
    except PreparationError as error:
        failed += _failed(rows, error)


def _setup(task: Task, shop: Workshop, rival: Rival, weights: str, modes: list[str]) -> Setup:
    model = shop.conversion(rival, task.checkpoint, weights)
    drafts = rival.draft_weights if any(mode.startswith(DRAFTING) for mode in modes) else None
    draft = shop.conversion(rival, task.draft, drafts) if drafts and task.draft else None
    return Setup(str(model.resolve()), str(draft.resolve()) if draft else None, weights, task.threads, modes, task.ends)


def _open(stations: list[Station], task: Task) -> bool:
    """Start and warm every worker; False where memory does not hold them all at once."""
    keep = True
    for number, station in enumerate(stations, 1):
        say(f"loading {number}/{len(stations)}: {station.worker.name}")
        _start(station, task)
        keep = keep and available_mb() > LOW_MEMORY_MB
        if not keep:
            station.worker.stop()
    if not keep:
        say(f"less than {LOW_MEMORY_MB} MB of memory left: workers are started again for each pass")
    _say_who_spins(stations)
    return keep


def _start(station: Station, task: Task) -> None:
    """Start a worker where it is not alive; a mode that fails in the warm-up is out, the others stay."""
    if station.worker.alive:
        return
    try:
        station.worker.start()
    except WorkerError as error:
        _failed(station.rows, error)
        return
    if not station.discovered:
        _discover(station, task)
    for row in station.rows:
        row.version, row.load_s = station.worker.ready["version"], station.worker.ready["load_s"]
        if row.error is None:
            _guarded(row, lambda row=row: warm_up(station.worker, row.mode, task.prompts[0]))


def _discover(station: Station, task: Task) -> None:
    """The rows of a bundle, in place of the one that stood for it."""
    first = station.rows[0]
    modes = [mode for mode in station.worker.ready["modes"] if task.wants(f"{first.rival}/{first.weights}/{mode}")]
    station.discovered = True
    station.rows[:] = [Configuration(first.rival, first.program, first.weights, mode) for mode in modes]
    if station.rows:
        station.rows[0].notes += station.worker.ready["notes"]


def _measure_perplexity(stations: list[Station], task: Task) -> None:
    """Of each loaded model once, shown in all its rows: how well its numbers still represent the checkpoint."""
    for station in stations if task.windows else ():
        _start(station, task)
        for row in station.rows[:1]:
            _guarded(row, lambda row=row, worker=station.worker: _ask_perplexity(row, worker, task))
        for row in station.rows:
            row.perplexity = station.rows[0].perplexity


def _ask_perplexity(row: Configuration, worker: Worker, task: Task) -> None:
    say(f"perplexity of {worker.name}")
    row.perplexity = worker.perplexity(list(task.windows))


def _round(number: int, rounds: int, stations: list[Station], task: Task, keep: bool) -> None:
    start = time.perf_counter()
    turn = number % max(1, len(stations))
    for station in stations[turn:] + stations[:turn]:
        for row in station.rows:
            if row.error is None:
                _start(station, task)  # also after a mode before it brought the worker down
            if row.error is None:
                _guarded(row, lambda row=row, worker=station.worker: _pass(row, worker, task))
        if not keep:
            station.worker.stop()
    took_min = (time.perf_counter() - start) / 60
    say(f"round {number + 1} of {rounds} took {took_min:.1f} min, about {took_min * (rounds - number - 1):.0f} min to go")


def _pass(row: Configuration, worker: Worker, task: Task) -> None:
    row.passes.append(measure(worker, row.mode, task.prompts, task.new_tokens))
    row.resident_mb = max(row.resident_mb or 0.0, worker.resident_mb())


def _guarded(row: Configuration, action: Any) -> None:
    try:
        action()
    except (WorkerError, OSError) as error:  # OSError: it ended just before its use was read
        _failed([row], error)


def _failed(rows: list[Configuration], error: Exception) -> list[Configuration]:
    for row in rows:
        row.error = str(error)
        say(f"{row.name} failed: {error}")
    return rows


def _report_failures(failed: list[Configuration]) -> int:
    say("everything is prepared" if not failed else f"{len(failed)} configurations could not be prepared")
    return FINE


def _say_who_spins(stations: list[Station]) -> None:
    alive = [station for station in stations if station.worker.alive]
    for station, share in zip(alive, idle_shares([station.worker for station in alive]), strict=True):
        if share > SPINNING:
            note = f"its idle worker keeps {share:.0%} of a core busy"
            say(f"{station.worker.name}: {note}")
            for row in station.rows[:1]:
                row.notes.append(note)


def _reference(task: Task, shop: Workshop) -> list[list[int]] | None:
    """Token ids of transformers' plain fp32 decoding, made once for a checkpoint, its prompts and a length."""
    rival = task.rivals[task.reference]
    file = shop.folder / "reference" / f"{fingerprint(task.checkpoint, rival)}.json"
    known: dict[str, list[int]] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    keys = [_key(prompt, task.new_tokens) for prompt in task.prompts]
    missing = [prompt for prompt, key in zip(task.prompts, keys, strict=True) if key not in known]
    if missing:
        say(f"decoding {len(missing)} prompts with transformers fp32 as the reference")
        try:
            known |= _decode_reference(task, shop, rival, missing)
        except (PreparationError, WorkerError) as error:
            say(f"no reference to compare with: {error}")
            return None
        if file.stem != fingerprint(task.checkpoint, rival):
            raise InputError(f"{task.checkpoint} changed while it was read: start again when it is finished")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known), "utf-8")
    return [known[key] for key in keys]


def _decode_reference(task: Task, shop: Workshop, rival: Rival, prompts: list[Prompt]) -> dict[str, list[int]]:
    setup = _setup(task, shop, rival, "fp32", ["plain"])
    worker = Worker(rival.name, shop.python(rival), setup, shop.log("reference"))
    try:
        worker.start()
        answers = [worker.ask("plain", prompt, task.new_tokens) for prompt in prompts]
    finally:
        worker.stop()
    return {_key(p, task.new_tokens): answer["token_ids"] for p, answer in zip(prompts, answers, strict=True)}


def _key(prompt: Prompt, new_tokens: int) -> str:
    sound = [hashlib.sha256(Path(prompt.audio).read_bytes()).hexdigest()] if prompt.audio else []
    return json.dumps([prompt.token_ids, new_tokens, *sound])


def _write_json(file: Path | None, task: Task, rows: list[Configuration], truth: Truth) -> None:
    if file is None:
        return
    report = {
        "command": sys.argv,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(),
        "checkpoint": str(task.checkpoint),
        "draft": str(task.draft) if task.draft else None,
        "prompts": [prompt.text for prompt in task.prompts],
        "new_tokens": task.new_tokens,
        "threads": task.threads,
        "reference_token_ids": truth.reference,
        "rows": as_json(rows, truth),
    }
    unfinished = file.with_name(file.name + ".part")
    unfinished.write_text(json.dumps(report, indent=1), "utf-8")
    unfinished.replace(file)


def _machine() -> dict[str, Any]:
    processors = [line for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines() if line.startswith("model name")]
    return {"processor": processors[0].split(":")[1].strip() if processors else "?", "system": platform.platform()}

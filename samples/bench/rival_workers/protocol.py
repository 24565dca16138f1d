"""The worker's side of a comparison: one JSON line in, one JSON line out. Standard library only.

A worker file is a module with a constant RIVAL and two commands, so that all knowledge about one rival sits in one
file. It imports the rival's packages inside its functions: the comparison reads RIVAL without having them.

    python -m rival_workers.X convert CHECKPOINT WEIGHTS FOLDER
    python -m rival_workers.X serve '{"model": FOLDER, "draft": FOLDER or null, "weights": ..., "threads": 2, "modes": []}'

`serve` answers first with {"load_s", "version", "modes", "notes"}, then once per request
{"mode", "prompt", "prompt_ids", "audio", "new_tokens"} with {"token_ids", "prefill_s", "decode_s", "forwards"}; and
{"windows": [token ids, …]} with {"perplexity"}, null where the program does not tell its logits.
An encoder-decoder takes the prompt as its source; or a sound file, and then `prompt_ids` is what its decoder starts from.
It does not know how many rounds there are, nor what the others do.
"""

import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Rival:
    """What a comparison must know of a rival before its packages are there.

    Attributes:
        name: of the worker file and of the environment.
        program: as its makers write it.
        packages: pinned requirements; empty where the environment of the comparison itself serves.
        weights: the precisions measured, one conversion each.
        groups: modes that share one loaded model, so one process; resident memory is that of a group.
        draft_weights: the precision of the draft model, whatever the target's.
        converts: False where the program reads the checkpoint itself.
        recipe: of `convert`; raise it with a change there, so that older conversions are not found again.
        unwanted: packages that come along and have to go again.
        shares: the worker whose environment and conversions it uses, with the same packages; its own where empty.
    """

    name: str
    program: str
    packages: tuple[str, ...]
    weights: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    draft_weights: str | None = None
    converts: bool = True
    recipe: int = 1
    unwanted: tuple[str, ...] = ()
    shares: str = ""


@dataclass(frozen=True)
class Setup:
    """What a worker is started with.

    Attributes:
        draft: None where no mode of the worker drafts with a model.
        modes: those of its group; empty where the worker finds them out.
        ends: the end token ends a text. Otherwise it is ordinary, and every text is as long as asked.
    """

    model: str
    draft: str | None
    weights: str
    threads: int
    modes: list[str]
    ends: bool = False


@dataclass(frozen=True)
class Answer:
    """One generation.

    Attributes:
        token_ids: what was added, with the end token where it came.
        prefill_s: of prompt or encoder, and the first token.
        forwards: of the target after the prompt's own; None where the program does not tell.
    """

    token_ids: list[int]
    prefill_s: float
    decode_s: float
    forwards: int | None = None


Generate = Callable[[dict[str, Any]], Answer]
Logits = Callable[[list[int]], Any]  # token ids to [T, V] logits, as numpy has them


@dataclass(frozen=True)
class Served:
    """A loaded model: its modes, how to call it, what is worth saying about it, and its logits where it tells them."""

    version: str
    modes: list[str]
    generate: Generate
    notes: list[str] = field(default_factory=list)
    logits: Logits | None = None


def main(convert: Callable[[Path, str, Path], None] | None, load: Callable[[Setup], Served]) -> None:
    """The two commands of a worker file; `convert` is None where the program reads what it is given."""
    answers = _private_stdout()
    if sys.argv[1] == "convert":
        if convert is None:
            sys.exit("this program reads what it is given: there is nothing to convert")
        convert(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        _serve(Setup(**json.loads(sys.argv[2])), load, answers)


def run_converter(command: list[str]) -> None:
    """A rival's own converter; where it fails, its last words are the error, not ours."""
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def version_of(*packages: str) -> str:
    """Installed versions, the first one bare: "0.18.0 (onnxruntime 1.31.1)"."""
    first, *others = (importlib.metadata.version(name) for name in packages)
    beside = ", ".join(f"{name} {version}" for name, version in zip(packages[1:], others, strict=True))
    return f"{first} ({beside})" if beside else first


def split_by_length(generate: Callable[[int], list[int]], new_tokens: int) -> tuple[list[int], float, float]:
    """Token ids, prefill and decode seconds of a program without a step: T(1), and T(N) - T(1)."""
    start = time.perf_counter()
    generate(1)
    middle = time.perf_counter()
    token_ids = generate(new_tokens)
    end = time.perf_counter()
    return token_ids, middle - start, (end - middle) - (middle - start)


def with_end(token_ids: list[int], end: int, limit: int) -> list[int]:
    """For programs that keep the end token to themselves: a text shorter than allowed has ended."""
    ended = len(token_ids) >= limit or token_ids[-1:] == [end]
    return list(token_ids) if ended else [*token_ids, end]


def _private_stdout() -> TextIO:
    """The real standard output for answers alone: libraries print to descriptor 1 as they like, so it becomes 2."""
    private = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return private


def _serve(setup: Setup, load: Callable[[Setup], Served], answers: TextIO) -> None:
    start = time.perf_counter()
    try:
        served = load(setup)
    except Exception as error:
        _say(answers, {"error": _one_line(error)})
        raise
    ready = {"load_s": time.perf_counter() - start, "version": served.version, "modes": served.modes}
    _say(answers, {**ready, "notes": served.notes})
    for line in sys.stdin:
        _say(answers, _answer(served, json.loads(line)))


def _answer(served: Served, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "windows" in request:
            return {"perplexity": _perplexity(served.logits, request["windows"]) if served.logits else None}
        return asdict(served.generate(request))
    except Exception as error:  # one mode that fails must not end the worker's other modes
        return {"error": _one_line(error)}


def _perplexity(logits: Logits, windows: list[list[int]]) -> float:
    """Of every token after the first of its window."""
    import numpy as np

    losses: list[float] = []
    for window in windows:
        scores = np.asarray(logits(window), np.float32)[:-1]
        highest = scores.max(-1)
        total = highest + np.log(np.exp(scores - highest[:, None]).sum(-1))
        losses += (total - scores[np.arange(len(scores)), window[1:]]).tolist()
    return math.exp(sum(losses) / len(losses))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()

"""Engines with fixed sizes: which profile a pass takes, and which slots a commit moves together.

Pure arithmetic, so that it is tested without the device that needs it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from headstart.runtime.engines.info import Profile
from headstart.runtime.errors import EngineError


@dataclass(frozen=True)
class Pass:
    """Some of a run's rows, and the profile they go through.

    Attributes:
        profile: its index in the plan.
        begin, end: the rows.
        padded: rows of the pass; those from `end` on are copies that no other row sees. 0 for a graph without rows.
        prompt: one row goes through the LM head, the one that is asked for; else all do.
        chosen: rows through the LM head.
        replayed: its size comes again, so that it may be captured as a CUDA graph.
    """

    profile: int
    begin: int
    end: int
    padded: int
    prompt: bool = False
    chosen: int = 0
    replayed: bool = True


def passes(profiles: Sequence[Profile], rows: int, chosen: int, batch: int = 1) -> list[Pass]:
    """Split `rows` rows into passes. A long run of rows of one sequence, of which one is chosen, is a prompt.

    Everything else is verified, in buckets.

    Raises EngineError when the plan has no profile of either kind.
    """
    prefills = [i for i, profile in enumerate(profiles) if profile.sizes.get("chosen", (0, 0, 0))[2] == 1]
    buckets = [i for i, profile in enumerate(profiles) if i not in prefills]
    if not buckets or not prefills:
        raise EngineError("The engine has no profile for prompts, or none for verifying. Fix: build it again, with --force.")
    if batch == chosen == 1 and rows > profiles[buckets[0]].sizes["rows"][2]:
        largest = profiles[prefills[0]].sizes["rows"][2]
        return [
            Pass(prefills[0], begin, end, end - begin, prompt=True, chosen=1, replayed=False)
            for begin, end in _pieces(rows, largest)
        ]
    found = []
    for begin, end in _pieces(rows, profiles[buckets[-1]].sizes["rows"][2]):
        profile = next(i for i in buckets if profiles[i].sizes["rows"][2] >= end - begin)
        padded = max(end - begin, profiles[profile].sizes["rows"][0])
        found.append(Pass(profile, begin, end, padded, chosen=padded))
    return found


def _pieces(rows: int, largest: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + largest, rows)) for begin in range(0, rows, largest)]


def runs(moved: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(from slot, to slot, slots) of moves that can be made at once: neighbours whose old and new places do not overlap."""
    found: list[tuple[int, int, int]] = []
    for source, target in moved:
        if found:
            begin, place, count = found[-1]
            if (source, target) == (begin + count, place + count) and count < begin - place:
                found[-1] = begin, place, count + 1
                continue
        found.append((source, target, 1))
    return found

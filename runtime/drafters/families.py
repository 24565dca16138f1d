"""DRAFTERS: one line per family of draft heads, from a head in a bundle to its drafter.

The exporter's half of each line, which recognises a published folder and writes its graphs, has the same name there.
"""

from collections.abc import Callable

from headstart.runtime.bundle import HeadInfo
from headstart.runtime.errors import BundleError
from headstart.runtime.graph import Engine

from .base import Drafter
from .medusa import MedusaDrafter
from .recurrent import RecurrentDrafter
from .shortlist import SHORTLIST, Shortlist, ShortlistDrafter

Load = Callable[[Engine, HeadInfo], Drafter]


def _medusa(engine: Engine, info: HeadInfo) -> Drafter:
    return MedusaDrafter(info.name, engine.graph(f"heads/{info.name}"), info.heads)


def _recurrent(engine: Engine, info: HeadInfo) -> Drafter:
    return RecurrentDrafter(info, engine.graph(f"heads/{info.name}"), engine.bundle)


def _shortlist(engine: Engine, info: HeadInfo) -> Drafter:
    shortlist = Shortlist(engine.graph(f"heads/{info.name}"), engine.bundle)
    return ShortlistDrafter(info.name, shortlist, info.vocab_size)


DRAFTERS: dict[str, Load] = {
    "medusa": _medusa,
    "hydra": _recurrent,
    "recurrent_drafting": _recurrent,
    "mlp_speculator": _recurrent,
    SHORTLIST: _shortlist,
}


def load_head(engine: Engine, info: HeadInfo) -> Drafter:
    """The drafter of a head of the engine's bundle. Raises BundleError for a family that this version does not know."""
    if info.family not in DRAFTERS:
        raise BundleError(
            f"The draft head {info.name!r} is of the family {info.family!r}, and this Headstart runs: {', '.join(DRAFTERS)}. "
            "Fix: a newer Headstart, or export again without that head."
        )
    return DRAFTERS[info.family](engine, info)

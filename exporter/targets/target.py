"""What a row of TARGETS implements: one kind of device that bundles are built for.

`exporter.build` knows no device. It opens the bundle, looks the row up, and for every graph of the manifest calls `lower` and
`write`; then it compares what `forms` names with the canonical graphs and writes engine.json from the attributes below.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import onnx_ir as ir

from headstart.runtime.bundle import Bundle
from headstart.runtime.drafters.shortlist import SHORTLIST
from headstart.runtime.engines.info import PlanInfo

Progress = Callable[[str], None]  # called with the name of each stage as it begins
OptionsT = TypeVar("OptionsT")
LoweredT = TypeVar("LoweredT")


def is_shortlist(bundle: Bundle, name: str) -> bool:
    """Whether a graph of that name is a head of the family shortlist."""
    head = name.removeprefix("heads/")
    return name.startswith("heads/") and bundle.head(head).family == SHORTLIST


@dataclass(frozen=True)
class Form:
    """A file of the engine that computes what one canonical graph does, and the number of sequences to compare it with.

    `lm_head`: the file that computes a decoder's logits from its hidden states, where `file` does not.
    """

    file: Path
    batch: int = 1
    lm_head: Path | None = None


class Target(ABC, Generic[OptionsT, LoweredT]):
    """One bundle being built for one device.

    Attributes:
        options_type: the dataclass of this device's options; its defaults are used where the user gives none.
        packages: whose versions engine.json records, with those in `versions`.
        graphs: name of a graph or of another form of it -> file, relative to the engine's folder.
        precisions: name of a graph -> the row of `runtime.precision.LIMITS` that bounds its difference from the canonical one.
        settings, passes, plans, cache_slots, batch, source_rows: as in `EngineInfo`.
    """

    options_type: ClassVar[type[Any]]
    packages: ClassVar[tuple[str, ...]] = ("headstart", "onnx-ir", "onnxscript")

    def __init__(self, bundle: Bundle, device: str, folder: Path, options: OptionsT, progress: Progress) -> None:
        """Decide everything that concerns all graphs.

        Raises OptionError for options or devices that exclude each other, MissingExtraError without the device's builder,
        EngineError for a bundle that this device cannot run.
        """
        self.bundle, self.device, self.folder = bundle, device, folder
        self.options, self.progress = options, progress
        self.versions: dict[str, str] = {}
        self.graphs: dict[str, str] = {}
        self.precisions: dict[str, str] = {}
        self.settings: dict[str, str] = {}
        self.passes: dict[str, int] = {}
        self.plans: dict[str, PlanInfo] = {}
        self.cache_slots = self.batch = self.source_rows = 0

    @classmethod
    def device_name(cls, device: str) -> str:
        """The device in its one spelling, which also names the engine's folder. Raises OptionError for one that is none."""
        return device

    def runs(self, name: str) -> bool:
        """Whether this device runs that graph at all. Only CPUs decide tokens with short lists."""
        return not is_shortlist(self.bundle, name)

    @abstractmethod
    def lower(self, name: str, model: ir.Model) -> LoweredT:
        """Rewrite one canonical graph for the device. Raises EngineError for a graph that the device cannot run."""

    @abstractmethod
    def write(self, name: str, lowered: LoweredT) -> None:
        """Write a lowered graph below `folder` and record it in `graphs`, and in `precisions` where it can be run here."""

    @abstractmethod
    def forms(self, name: str) -> tuple[Form, ...]:
        """The files to compare with the canonical graph of that name; none where this machine cannot run them."""

"""The interface of a family of draft heads: one `Family` each, in its own module, listed in `families.FAMILIES`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from headstart.runtime.bundle import HeadInfo, ModelInfo, WeightInfo

from .folder import HeadFolder


@dataclass(frozen=True)
class Format:
    """The published format that a folder holds.

    Attributes:
        dialect: its name, which the bundle records.
        lossy: why its published model does not write what the target writes; empty for a lossless one.
    """

    dialect: str
    lossy: str = ""


@dataclass(frozen=True)
class Reads:
    """What a head reads of the target.

    Attributes:
        hidden: the output after the final norm.
        aux_layers: outputs of single layers, as indices into transformers' `hidden_states`.
        embeddings: the target's input embeddings, as a weight that both share.
    """

    hidden: bool = True
    aux_layers: tuple[int, ...] = ()
    embeddings: bool = False


@dataclass(frozen=True)
class Installation:
    """Where a head's graphs go, and the target that they must fit.

    Attributes:
        folder: an empty folder for `head.onnx` and its weights; `name` is the head's in the bundle.
        model: the target; its `aux_layers` contain those that the head reads, in the order of the target's `aux_hidden`.
        weights: of the target, that the head's graphs may share ("lm_head", and "lm_head.scale" in quantized bundles).
        target: the target's bundle, in whose files those weights lie.
        top_k: candidates per proposed token, at most.
    """

    folder: Path
    name: str
    model: ModelInfo
    weights: Mapping[str, WeightInfo]
    target: Path
    top_k: int

    def file(self, graph: str) -> str:
        """The path of one of its graphs relative to the bundle, as the manifest states it."""
        return f"heads/{self.name}/{graph}"


@dataclass(frozen=True)
class Family:
    """One family of draft heads, as published; each function raises HeadError for a damaged or unsuitable folder.

    Attributes:
        recognise: the format that the folder holds; None when it holds a head of another family.
        reads: what the head reads of a target of so many layers. Asked before the target is traced.
        to_graphs: writes the head's graphs, and returns their description, with `family` and `dialect` as given.
    """

    recognise: Callable[[HeadFolder], Format | None]
    reads: Callable[[HeadFolder, int], Reads]
    to_graphs: Callable[[HeadFolder, str, Installation], HeadInfo]

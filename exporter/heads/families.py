"""FAMILIES: one line per family of draft heads, from a published folder to graphs in a bundle.

The runtime's half of each line, which loads the drafter, has the same name in `runtime.drafters.families`.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from headstart.runtime.bundle import Manifest, ModelInfo, WeightInfo
from headstart.runtime.documents import to_json
from headstart.runtime.errors import HeadError

from . import hydra, medusa, mlp_speculator, recurrent_drafting
from .family import Family, Installation, Reads
from .folder import HeadFolder
from .unsupported import unsupported_family

FAMILIES: dict[str, Family] = {
    "medusa": medusa.FAMILY,
    "hydra": hydra.FAMILY,
    "recurrent_drafting": recurrent_drafting.FAMILY,
    "mlp_speculator": mlp_speculator.FAMILY,
}

TOP_K = 10  # candidates per head, as published
RESERVED = ("auto", "none", "ngram", "source_copy", "previous_hypothesis", "draft_model")  # other values of --drafter
LONGEST_NAME = 64  # characters: it becomes a folder's name


@dataclass(frozen=True)
class RecognisedHead:
    """A folder whose family and format are known."""

    folder: HeadFolder
    family: str
    dialect: str

    def reads(self, layers: int) -> Reads:
        """What the head reads of a target of so many layers."""
        return FAMILIES[self.family].reads(self.folder, layers)


def recognise(path: Path, lossy: bool = False) -> RecognisedHead:
    """The head in a folder, of any known family and format; of a lossy format only when `lossy`.

    Raises HeadError when the folder holds another family or nothing known, or cannot be read.
    """
    folder = HeadFolder.open(path)
    for name, family in FAMILIES.items():
        found = family.recognise(folder)
        if found is not None and found.lossy and not lossy:
            raise HeadError(f"{path}: {found.lossy}")
        if found is not None:
            return RecognisedHead(folder, name, found.dialect)
    raise HeadError(f"{path}: {_not_recognised(folder)}")


def _not_recognised(folder: HeadFolder) -> str:
    family = unsupported_family(folder)
    if family:
        return (
            f"this is a {family} head, and this version imports heads of these families only: {', '.join(FAMILIES)}. "
            "Fix: such heads for the same target; headstart heads train trains them."
        )
    shown = ", ".join(list(folder.files)[:3])
    return (
        "no draft head was recognised. Looked for Medusa tensors such as 0.0.linear.weight, medusa_head.0.0.linear.weight, "
        "medusa_heads.0.0.linear.weight and blocks.0.layers.0.weight, and for the names of other families; "
        f"found {shown or 'no weights at all'}. Fix: the folder that holds the head's own weight file."
    )


def aux_layers(heads: Iterable[RecognisedHead], layers: int) -> tuple[int, ...]:
    """The layers whose outputs a target of so many layers must return for these heads; each once, in rising order."""
    return tuple(sorted({index for head in heads for index in head.reads(layers).aux_layers}))


def add_head(
    bundle: Path,
    manifest: Manifest,
    head: RecognisedHead,
    name: str | None = None,
    top_k: int = TOP_K,
    target: Path | None = None,
) -> Manifest:
    """Write `heads/<name>/` into a bundle folder; returns the manifest that names it. Does not write the manifest.

    `target` is the bundle that holds the target's weights, where that is another folder.

    Raises HeadError when the head does not fit the target, or reads what the target's graph does not return.
    """
    name = default_name(manifest, head.family) if name is None else name
    check_name(name)
    check_reads(head, manifest.model, manifest.weights)
    folder = bundle / "heads" / name
    folder.mkdir(parents=True)
    installation = Installation(folder, name, manifest.model, manifest.weights, target or bundle, top_k)
    info = FAMILIES[head.family].to_graphs(head.folder, head.dialect, installation)
    (folder / "head.json").write_text(to_json(dataclasses.replace(info, family=head.family)), "utf-8")
    return dataclasses.replace(manifest, heads=(*manifest.heads, name))


def check_reads(head: RecognisedHead, model: ModelInfo, weights: dict[str, WeightInfo]) -> None:
    """Raises HeadError unless the target's graph returns what the head reads."""
    reads = head.reads(model.layers)
    missing = [index for index in reads.aux_layers if index not in model.aux_layers]
    if missing:
        wanted = ",".join(map(str, sorted({*model.aux_layers, *reads.aux_layers})))
        raise HeadError(
            f"{head.folder.path} reads the target's layers {list(reads.aux_layers)}, and this bundle's graph returns "
            f"{list(model.aux_layers) or 'none'}. Fix: export the target with --head, or with --aux-layers {wanted}."
        )
    if reads.embeddings and "embeddings" not in weights:
        raise HeadError(f"{head.folder.path} reads the target's embeddings, which this bundle's graph does not share.")


def check_name(name: str) -> None:
    """Raises HeadError for a name of another drafter, or one that is not a safe file name everywhere."""
    if name in RESERVED:
        raise HeadError(f"{name!r} cannot name a head: it names another drafter. Reserved: {', '.join(RESERVED)}.")
    if not (name.isidentifier() and name.isascii()) or len(name) > LONGEST_NAME:
        raise HeadError(
            f"{name[:80]!r} cannot name a head: 1 to {LONGEST_NAME} letters, digits and _ can, beginning with a letter or _. "
            "Fix: another name."
        )


def default_name(manifest: Manifest, family: str) -> str:
    """medusa, medusa2, medusa3, …: the first that is free."""
    taken = set(manifest.heads)
    return next(name for i in range(1, 1000) if (name := f"{family}{i if i > 1 else ''}") not in taken)

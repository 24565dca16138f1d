"""`headstart heads`: the draft heads and short lists of a bundle."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .arguments import BundleArg, Force

heads = typer.Typer(help="Draft heads: train, import, list, or a short list of the vocabulary.", no_args_is_help=True)


@heads.command("list")
def list_heads(bundle: BundleArg) -> None:
    """The draft heads of a bundle."""
    from headstart.runtime.bundle import Bundle

    from .screen import show_heads

    show_heads(Bundle.load(bundle))


@heads.command("import")
def import_heads(
    bundle: BundleArg,
    head: Annotated[Path, typer.Argument(help="Folder of the head, in a published format.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="What to call it; its family by default.")] = None,
    top_k: Annotated[int, typer.Option(help="Candidates per head.", min=1)] = 10,
    lossy: Annotated[bool, typer.Option("--lossy", help="Take heads whose published model is not lossless.")] = False,
    force: Force = False,
) -> None:
    """Add a draft head to a bundle."""
    from headstart.calibration.quantized_heads import import_head

    from .screen import stages

    with stages() as progress:
        progress("importing the head")
        info = import_head(bundle, head, name, top_k, force, lossy)
    print(f"{bundle}/heads/{info.name}: {info.heads} heads, format {info.dialect}")


@heads.command("shortlist")
def shortlist(
    bundle: BundleArg,
    data: Annotated[
        Path | None, typer.Option(help="Text of the kind to be written, or JSONL; Python's own sources by default.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="To be listed.", min=16)] = 16384,
    name: Annotated[str, typer.Option(help="What to call it.")] = "shortlist",
    force: Force = False,
) -> None:
    """Let a bundle decide tokens with the part of its vocabulary that texts use most, and check several at once."""
    from headstart.calibration.shortlist import make_shortlist

    from .screen import stages

    with stages() as progress:
        progress("counting tokens")
        made = make_shortlist(bundle, data, tokens, name, force)
    print(
        f"{bundle}/heads/{made.info.name}: {made.info.top_k} of {made.info.vocab_size} tokens, {made.coverage:.1%} of the "
        f"text's. Next: headstart build {bundle} --device cpu --force"
    )


@heads.command("train")
def train(
    checkpoint: Annotated[str, typer.Argument(help="The base: a checkpoint folder or hub name.", show_default=False)],
    data: Annotated[
        list[Path], typer.Option(help="Text or sound file, or a folder of such; may be repeated.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The heads' folder.", show_default=False)],
    family: Annotated[Literal["medusa", "blockwise", "hydra"], typer.Option(help="Family of heads.")] = "medusa",
    count: Annotated[int, typer.Option("--heads", help="Future tokens, one head each.")] = 4,
    layers: Annotated[int, typer.Option(help="Residual blocks per head.")] = 1,
    share_lm_head: Annotated[bool, typer.Option("--share-lm-head", help="Project with the base's LM head.")] = False,
    draft_vocab: Annotated[int, typer.Option(help="Draft only so many tokens, the base's most frequent; 0 for all.")] = 0,
    sequences: Annotated[int, typer.Option(help="Texts the base writes to train on.")] = 1024,
    epochs: Annotated[int, typer.Option(help="Passes over them.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Peak rate.")] = 1e-3,
    work: Annotated[
        Path | None, typer.Option(help="Keep text and training state there; by default in OUTPUT.work until it is done.")
    ] = None,
    force: Force = False,
) -> None:
    """Train draft heads on the base's own continuations of your text, or its outputs for your sources, one a line.

    The same command goes on where an interrupted one stopped.
    """
    from headstart.calibration.distill import DistillOptions
    from headstart.calibration.train import TrainOptions, train_heads

    from .screen import counted, show_accuracy

    distill = DistillOptions(sequences=sequences)
    options = TrainOptions(
        heads=count,
        layers=layers,
        own_projection=not share_lm_head,
        epochs=epochs,
        learning_rate=learning_rate,
        distill=distill,
        family=family,
        draft_vocab=draft_vocab,
    )
    with counted() as progress:
        report = train_heads(checkpoint, data, output, options, force, progress, work)
    show_accuracy(report)

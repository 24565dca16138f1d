"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated, Literal

import typer

BundleArg = Annotated[Path, typer.Argument(help="Folder of a bundle.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Device = Annotated[
    str, typer.Option(help="cpu, or what the bundle was built for: cuda, cuda:tensorrt, trt-rtx:sm89, tensorrt.")
]
Threads = Annotated[int | None, typer.Option(help="Threads of the engine; all cores by default.", min=1)]
Untuned = Annotated[bool, typer.Option("--untuned", help="Ignore what headstart tune measured.")]
DraftModel = Annotated[Path | None, typer.Option(help="A smaller bundle with the same vocabulary, as the drafter draft_model.")]
NewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", "-n", help="The most tokens to add: 128; all there is room for with --audio."),
]
DrafterName = Annotated[
    str | None, typer.Option(help="auto (as tuned, else n-gram), none, ngram, draft_model, or a head's name.")
]
Acceptance = Annotated[
    str | None, typer.Option(help="Name of an acceptance rule; the lossless one that fits the draft by default.")
]
BuildFor = Annotated[
    str,
    typer.Option(help="cpu, cuda, trt-rtx:sm89 (or another GPU generation, or several: trt-rtx:sm86,sm120), tensorrt."),
]
Precision = Annotated[
    Literal["float16", "bfloat16"] | None,
    typer.Option(help="TensorRT and cuda: of a float32 bundle; float16 by default."),
]
BuiltFor = Annotated[
    str, typer.Option(help="cpu, or what the bundle was built for: cuda (or cuda:tensorrt), trt-rtx:sm89, tensorrt.")
]

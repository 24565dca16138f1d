"""Logits against a reference: golden outputs, the checkpoint, the canonical graph; each row counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.exporter.golden import Texts
from headstart.runtime.errors import OptionError, missing_extra
from headstart.runtime.graph import Engine
from headstart.runtime.precision import LIMITS, Limits

from .outcome import LogitCheck
from .passes import Logits, causal_logits
from .reference import spread_of


@dataclass
class Comparison:
    """Rows compared so far, by text. `limits`: None are those declared for the precision."""

    subject: str
    reference: str
    precision: str
    limits: Limits | None = None
    texts: list[NDArray[np.float32]] = field(default_factory=list)  # [rows] relative differences of each
    problem: str = ""

    def add(self, ours: Logits, theirs: Logits, spread: NDArray[np.float32] | None = None) -> None:
        """[rows, V] each. `spread` [rows]: the reference's logit range, where `theirs` holds only some of its logits."""
        for name, values in ((self.reference, theirs), (self.subject, ours)):
            wrong = int(values.size - np.isfinite(values).sum())
            if wrong and not self.problem:
                self.problem = f"{name}: {wrong} of {values.size} logits of text {len(self.texts)} are NaN or infinite"
        spread = spread_of(theirs) if spread is None else spread
        with np.errstate(invalid="ignore"):
            self.texts.append(np.abs(ours - theirs).max(axis=-1) / spread)

    def result(self) -> LogitCheck:
        limits = self.limits or LIMITS[self.precision]
        rows = np.concatenate(self.texts) if self.texts else np.zeros(0, np.float32)
        bounds = (limits.largest, limits.median)
        if self.problem or not len(rows):
            problem = self.problem or "nothing was compared"
            return LogitCheck(self.subject, self.reference, self.precision, len(rows), np.nan, np.nan, *bounds, problem=problem)
        text = int(np.argmax([one.max(initial=0.0) for one in self.texts]))
        sizes = (float(rows.max()), float(np.median(rows)))
        worst = (text, int(self.texts[text].argmax()))
        return LogitCheck(self.subject, self.reference, self.precision, len(rows), *sizes, *bounds, *worst)


def check_golden(
    engine: Engine,
    golden: Mapping[str, NDArray[Any]],
    precision: str,
    subject: str = "engine",
    limits: Limits | None = None,
) -> LogitCheck:
    """The recorded top logits of all rows of the golden inputs."""
    comparison = Comparison(subject, "golden outputs", precision, limits)
    texts = Texts(golden["input_ids"], golden.get("sources"))
    recorded = zip(golden["top_ids"], golden["top_logits"], golden["spread"], strict=True)
    for (ids, source), (top_ids, top_logits, spread) in zip(texts.pairs(), recorded, strict=True):
        logits = causal_logits(engine, [ids.tolist()], source)[0]
        comparison.add(np.take_along_axis(logits, top_ids.astype(np.int64), axis=-1), top_logits, spread)
    return comparison.result()


def check_checkpoint(engine: Engine, checkpoint: str | Path, texts: Texts, precision: str) -> LogitCheck:
    """Every logit of [N, T] texts against the checkpoint run by transformers in float32.

    Raises MissingExtraError without the export extra, OptionError for a checkpoint with another vocabulary.
    """
    try:
        from headstart.exporter.checkpoint import load_checkpoint
        from headstart.exporter.golden import reference_logits
    except ModuleNotFoundError as error:
        raise missing_extra(error, "Comparing with a checkpoint") from error
    reference = reference_logits(load_checkpoint(checkpoint).model, texts.input_ids, texts.sources)
    if reference.shape[-1] != engine.model.vocab_size:
        raise OptionError(
            f"{checkpoint} has {reference.shape[-1]} logits, the bundle {engine.model.vocab_size}: another model."
        )
    ours = [causal_logits(engine, [ids.tolist()], source)[0] for ids, source in texts.pairs()]
    return compared("engine", str(checkpoint), precision, ours, list(reference))


def compared(
    subject: str,
    reference: str,
    precision: str,
    ours: Sequence[Logits],
    theirs: Sequence[Logits],
    limits: Limits | None = None,
) -> LogitCheck:
    """Text by text."""
    comparison = Comparison(subject, reference, precision, limits)
    for one, other in zip(ours, theirs, strict=True):
        comparison.add(one, other)
    return comparison.result()

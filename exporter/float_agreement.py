"""Quantized weights against the float model they came from: does int8 or int4 still mean anything for these weights?

A lowered graph may equal its quantized canonical graph while both are far from the checkpoint, as where one input channel is a
thousand times the others and a scale per output channel rounds all other weights to zero. So the golden file of a quantized
bundle keeps the float model's outputs, too, and both `quantize` and `build` are measured against them.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime import contract
from headstart.runtime.precision import LEAST_AGREEMENT, FloatAgreement, check_finite

from .check import Inputs, prefill_step
from .golden import float_reference, read_golden
from .targets.target import Target

Arrays = Mapping[str, NDArray[Any]]


def float_agreement(target: Target[Any, Any]) -> FloatAgreement | None:
    """Of an engine of a quantized bundle; None for float bundles, and where the engine cannot be run on this machine."""
    golden = read_golden(target.bundle)
    reference = float_reference(golden)
    if reference is None or not target.forms("decoder"):
        return None
    target.progress("comparing with the float model")
    sources = golden.get("sources")
    texts = forced_texts(golden["input_ids"], reference)
    logits = [_logits(target, ids[None], None if sources is None else sources[i : i + 1]) for i, ids in enumerate(texts)]
    return agreement(np.concatenate(logits), reference)


def forced_texts(input_ids: NDArray[np.int64], reference: Arrays) -> NDArray[np.int64]:
    """[N, T + tokens - 1]: the golden inputs, each with the float model's greedy continuation but for its last token."""
    return np.concatenate([input_ids, reference["greedy"][:, :-1]], axis=1)


def agreement(logits: NDArray[np.float32], reference: Arrays) -> FloatAgreement:
    """Compare with the float model.

    Args:
        logits: [N, T + tokens - 1, V] over `forced_texts`, so that one different token does not change all later ones.
        reference: the float model's golden outputs, see `golden.float_reference`.

    Raises EngineError for NaN or infinity.
    """
    check_finite("The quantized decoder", logits)
    length = reference["top_ids"].shape[1]
    ours = np.take_along_axis(logits[:, :length], reference["top_ids"].astype(np.int64), axis=-1)
    relative = np.abs(ours - reference["top_logits"]).max(axis=-1) / reference["spread"]
    equal = logits[:, length - 1 :].argmax(axis=-1) == reference["greedy"]
    return FloatAgreement(float(equal.mean()), float(relative.max()), float(np.median(relative)))


def warn_if_poor(weights: str, found: FloatAgreement | None) -> None:
    """One warning where quantized weights ("int8") do not represent the model."""
    if found is None or found.greedy >= LEAST_AGREEMENT:
        return
    warnings.warn(
        f"With {weights} weights the model picks {found.greedy:.0%} of the float model's greedy tokens on the golden texts "
        f"(at least {LEAST_AGREEMENT:.0%} is expected), and its logits are {found.median:.0%} of their range off in a typical "
        "row. Fix: headstart quantize --method gptq --data FILE, or decode the float bundle.",
        RuntimeWarning,
        stacklevel=3,
    )


def _logits(target: Target[Any, Any], ids: NDArray[np.int64], source: NDArray[Any] | None) -> NDArray[np.float32]:
    """[1, T, V] of one text, through the engine's own encoder where there is one."""
    inputs = Inputs(target.bundle, ids, source)
    if source is not None:
        inputs.read_from(inputs.run("encoder", target.forms("encoder")[0])[-1])
    logits: NDArray[np.float32] = inputs.run("decoder", target.forms("decoder")[0], [prefill_step(ids, ids.shape[1])])[-1][
        contract.LOGITS
    ]
    return logits

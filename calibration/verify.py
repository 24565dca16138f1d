"""Is the bundle what it claims to be, and is decoding lossless? Every check here can fail, and tests make each fail.

1. Files: every file of the bundle and of the engine against its sha256.
2. Values: no NaN or infinity in golden outputs, weights, or any graph's outputs.
3. Logits: the canonical graph against the golden outputs of the checkpoint, the engine against both, and, when it is given,
   against the checkpoint in torch; each form of decoding (trees, commits, batches, chunks) against the canonical graph's pass.
4. Greedy decoding: plain and with every drafter, each token judged by the canonical graph.
5. Sampled decoding: with every drafter, against the exact distribution.

All limits are declared, by precision, in `runtime.precision.LIMITS`, wider where rounding by itself leads further from the
reference (`rounding_noise`); none is taken from the engine under test.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from headstart.exporter.golden import Texts, read_golden
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import MissingExtraError, OptionError
from headstart.runtime.graph import MAX_ROWS
from headstart.runtime.loading import load
from headstart.runtime.model import ARRAYS, Model, Prompt
from headstart.runtime.precision import INTEGERS

from .verification.forms import check_forms
from .verification.greedy import check_greedy, check_recorded
from .verification.integrity import damaged_files, not_finite_golden, not_finite_outputs, not_finite_weights
from .verification.logits import check_checkpoint, check_golden, compared
from .verification.outcome import Fault, LogitCheck, Report
from .verification.passes import causal_logits
from .verification.reference import Reference, Text, engine_precision
from .verification.rounding_noise import rounding_noise
from .verification.sampling import check_sampling

Progress = Callable[[str, int, int], None]  # what, done, of
SAMPLES = 1000  # continuations drawn with each drafter: a bias of about 0.15 total variation is found
FORM_PROMPTS = 3  # whose tokens go through every form of decoding, with the golden texts
BATCH = 3  # sequences decoded together
SAMPLING_BATCH = 16


def verify(
    bundle: str | Path,
    prompts: Sequence[Prompt] = (),
    max_new_tokens: int = 128,
    checkpoint: str | Path | None = None,
    draft_model: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = lambda what, done, of: None,
    *,
    threads: int | None = None,
    samples: int = SAMPLES,
) -> Report:
    """Run all checks. With no prompts, the golden inputs' texts serve as prompts.

    Args:
        checkpoint: to compare with as well, in torch.
        draft_model: another bundle, verified as the drafter "draft_model".
        device: as `load` takes it.
        samples: drawn with each drafter; 0 leaves sampled decoding out.

    Raises BundleError, OptionError, EngineError, MissingExtraError; a difference or a damaged file is not raised but reported.
    """
    opened = Bundle.load(bundle, check_hashes=False)
    _check_options(opened, checkpoint, samples)
    faults, notes = broken(opened, device)
    if faults:
        return Report(str(bundle), device, "", tuple(faults), notes=(*notes, "nothing was computed: see the faults"))
    model = load(bundle, device, threads, draft_model)
    reference = Reference.open(opened, threads)
    report = verify_model(model, reference, read_golden(opened), prompts, max_new_tokens, checkpoint, samples, progress)
    return dataclasses.replace(report, device=device, notes=(*notes, *report.notes))


def _check_options(bundle: Bundle, checkpoint: str | Path | None, samples: int) -> None:
    if samples < 0:
        raise OptionError(f"--samples must be 0 (none) or more, got {samples}.")
    if checkpoint is not None and bundle.manifest.quantization:
        raise OptionError(
            "--checkpoint compares exported logits with the checkpoint's, and this bundle's weights are quantized. "
            "Fix: leave it out, or verify the float32 bundle."
        )
    if checkpoint is not None and bundle.manifest.model.source == "states":
        raise OptionError(
            f"--checkpoint needs sources, and {bundle.path} is an assistant, which reads encoder states. Fix: leave it out."
        )


def broken(bundle: Bundle, device: str) -> tuple[list[Fault], list[str]]:
    """(what can be seen without computing anything: damaged files, or NaN and infinity; what was not looked at)."""
    faults = damaged_files(bundle, device)
    if faults:
        return faults, []
    faults = not_finite_golden(read_golden(bundle))
    try:
        return faults + not_finite_weights(bundle, device), []
    except ModuleNotFoundError:
        return faults, ["weights were not searched for NaN, outputs were: that needs pip install 'headstart[export]'"]


def verify_model(
    model: Model,
    reference: Reference,
    golden: Mapping[str, NDArray[Any]],
    prompts: Sequence[Prompt] = (),
    max_new_tokens: int = 128,
    checkpoint: str | Path | None = None,
    samples: int = SAMPLES,
    progress: Progress = lambda what, done, of: None,
) -> Report:
    """All that is computed: `model`, which may be a stand-in with a fault, against the reference."""
    precision = engine_precision(model.engine)
    name, device, notes = str(model.bundle.path), model.engine.device, []
    faults = not_finite_outputs({"canonical": reference.engine, device: model.engine}, model.bundle, golden)
    if faults:
        return Report(name, device, precision, tuple(faults))
    texts = list(prompts) or golden_prompts(model, golden)
    compared_texts = [*golden_texts(golden), *prompt_texts(model, texts[:FORM_PROMPTS])]
    if precision in INTEGERS:
        try:
            reference.noise = rounding_noise(reference, compared_texts)
        except MissingExtraError as error:
            notes.append(str(error))
    logits = _check_logits(model, reference, golden, compared_texts, checkpoint, precision, progress)
    if any(check.problem for check in logits):
        return Report(name, device, precision, (), tuple(logits), notes=("no text was decoded: see the faults",))
    greedy = check_recorded(model.engine, reference, golden, precision)
    greedy += check_greedy(model, reference, texts, max_new_tokens, precision, progress)
    drawn = check_sampling(model, reference, texts, samples, _batch(model, SAMPLING_BATCH), progress) if samples else ([], [])
    sampling, passes = drawn
    if not sampling:
        notes.append("sampled decoding was not checked")
    return Report(name, device, precision, (), (*logits, *passes), tuple(greedy), tuple(sampling), tuple(notes))


def _check_logits(
    model: Model,
    reference: Reference,
    golden: Mapping[str, NDArray[Any]],
    texts: Sequence[Text],
    checkpoint: str | Path | None,
    precision: str,
    progress: Progress,
) -> list[LogitCheck]:
    engine, limits = model.engine, reference.limits(precision)
    checks = [check_golden(reference.engine, golden, engine.model.dtype, reference.name)]
    checks.append(check_golden(engine, golden, precision, limits=limits))
    progress("golden outputs", 1, 1)
    if checkpoint is not None:
        inputs = Texts(golden["input_ids"], golden.get("sources"))
        checks.append(check_checkpoint(engine, checkpoint, inputs, precision))
        progress("checkpoint", 1, 1)
    ours = [causal_logits(engine, [text.token_ids], text.source)[0] for text in texts]
    checks.append(compared("engine", reference.name, precision, ours, [reference.logits(text) for text in texts], limits))
    checks += check_forms(engine, reference, texts, precision, _batch(model, BATCH))
    progress("forms of decoding", 1, 1)
    return checks


def _batch(model: Model, wanted: int) -> int:
    """Sequences that the engine decodes together: some are built for a fixed number."""
    built = model.engine.built
    return min(wanted, built[0].batch) if built is not None and built[0].batch else wanted


def golden_texts(golden: Mapping[str, NDArray[Any]]) -> list[Text]:
    pairs = Texts(golden["input_ids"], golden.get("sources")).pairs()
    return [Text(tuple(ids.tolist()), source) for ids, source in pairs]


def prompt_texts(model: Model, prompts: Sequence[Prompt]) -> list[Text]:
    """The prompts as the decoder reads them; answers, where the prompt is what the encoder reads."""
    texts = []
    for prompt in prompts:
        given = model.input(prompt)
        ids = given.prompt_ids
        if given.source is not None:
            ids = (*ids, *model.generate(prompt, drafter="none", max_new_tokens=MAX_ROWS - len(ids)).token_ids)
        texts.append(Text(ids[:MAX_ROWS], given.source))
    return texts


def golden_prompts(model: Model, golden: Mapping[str, NDArray[Any]]) -> list[Prompt]:
    """The golden inputs, or what the encoder reads, in the form that `generate` takes."""
    if model.bundle.manifest.model.source in ARRAYS:
        return list(golden["sources"])
    return [model.tokenizer.decode(ids) for ids in golden.get("sources", golden["input_ids"]).tolist()]

"""From a bundle on disk to a model: its engine, its drafters, and what tuning measured of them."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from .bundle import Bundle
from .drafters.aligned_copy import source_copy
from .drafters.base import Drafter
from .drafters.cascade import Cascade
from .drafters.draft_model import DraftModelDrafter
from .drafters.families import load_head
from .drafters.ngram import NGramDrafter
from .drafters.shortlist import SHORTLIST, ShortlistDrafter
from .engines.ort_engine import DRAFT_THREADS
from .engines.registry import device_kind, open_engine
from .errors import OptionError
from .graph import Engine, SplitDecoder
from .memory import give_back_freed_memory
from .model import Model
from .tokenizer import Tokenizer
from .tuning import DrafterTuning, Tuning, read_tuning
from .verify_cost import VerifyCost


def load(
    path: str | Path,
    device: str = "cpu",
    threads: int | None = None,
    draft_model: str | Path | None = None,
    tuned: bool = True,
) -> Model:
    """Load a bundle for decoding.

    Args:
        path: the bundle's folder.
        device: "cpu", or what the bundle was built for: "cuda" ("cuda:tensorrt" asks ONNX Runtime's TensorRT provider first),
            "trt-rtx:sm89", "tensorrt".
        threads: of the engine; every core that this process may use when None.
        draft_model: another bundle with the same vocabulary, offered as the drafter "draft_model".
        tuned: use what `headstart tune` measured.

    Raises:
        BundleError: no bundle, another schema, or a file that was edited.
        MissingExtraError: no engine is installed.
        OptionError: unknown device, or a draft model with another vocabulary.
        EngineError: the built engine or the tuning is of another bundle, machine or number of threads; or there is no GPU.
    """
    device_kind(device)  # refuse an unknown device before anything is read
    bundle = Bundle.load(path, check_hashes=False)  # the engine checks what it reads
    tokenizer = Tokenizer.load(bundle.path / "tokenizer")
    give_back_freed_memory()  # before the weights come: the two peaks do not add up
    engine = open_engine(bundle, device, threads)
    _warn_if_slow(engine)
    built = engine.built[0] if engine.built else None
    tuning = read_tuning(bundle, device, built, engine.threads) if tuned else None
    draft_engine = None if draft_model is None else _draft_engine(draft_model, bundle)
    drafters = _drafters(engine, draft_engine, tuning)
    return Model(bundle, engine, tokenizer, drafters, tuning)


def _warn_if_slow(engine: Engine) -> None:
    """Canonical graphs run anywhere, but ONNX Runtime computes quantized ones of them in float, weight by weight."""
    bundle = engine.bundle
    if bundle.manifest.quantization and engine.built is None:
        text = (
            f"{bundle.path} is quantized and not built for {engine.device}: decoding is up to ten times slower than built. "
            f"Fix: headstart build {bundle.path} --device {engine.device}."
        )
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def _drafters(engine: Engine, draft_engine: Engine | None, tuning: Tuning | None) -> dict[str, Drafter]:
    """The bundle's heads, text indices, the draft model, and the pairs that tuning measured, with their measured rates."""
    bundle = engine.bundle
    heads = [bundle.head(name) for name in bundle.manifest.heads]
    can_wait = isinstance(engine.graph("decoder"), SplitDecoder)  # for the LM head, as a short list needs it
    drafters = {head.name: load_head(engine, head) for head in heads if can_wait or head.family != SHORTLIST}
    use_provisional_cost(drafters, tuning.provisional if tuning else None)
    drafters["ngram"] = NGramDrafter()
    if bundle.manifest.model.source == "text":
        drafters["source_copy"] = source_copy()
    if draft_engine is not None:
        drafters["draft_model"] = DraftModelDrafter("draft_model", draft_engine)
    for name, tuned in (tuning.drafters if tuning else {}).items():
        if all(part in drafters for part in name.split("+")):  # else tuned with a draft model that is not given this time
            drafters[name] = with_rates(drafters, name, tuned)
    if tuning is None:
        for listed in [drafter for drafter in drafters.values() if isinstance(drafter, ShortlistDrafter)]:
            untuned = listed.after(drafters["ngram"])
            drafters[untuned.name] = untuned
    return drafters


def use_provisional_cost(drafters: Mapping[str, Drafter], cost: VerifyCost | None) -> None:
    """Let short lists, and pairs made of them later, choose by this t(1, n); None leaves them to learn it."""
    for drafter in drafters.values():
        if isinstance(drafter, ShortlistDrafter) and cost is not None:
            drafter.cost = cost


def with_rates(drafters: Mapping[str, Drafter], name: str, tuned: DrafterTuning) -> Drafter:
    """The drafter of that name, or what its parts make together, using the measured rates."""
    drafter, *others = (drafters[part] for part in name.split("+"))
    for other in others:
        drafter = _pair(drafter, other, tuned.enough)
    drafter.use_rates(tuned.rates)
    return drafter


def _pair(first: Drafter, second: Drafter, enough: float) -> Drafter:
    if isinstance(second, ShortlistDrafter):
        return second.after(first)
    return Cascade(first, second, enough)


def _draft_engine(path: str | Path, target: Bundle) -> Engine:
    bundle = Bundle.load(path, check_hashes=False)
    if bundle.manifest.model.source == "states":
        _check_assistant(path, bundle, target)
    elif _reads(target) != _reads(bundle):
        raise OptionError(f"{path} reads {_reads(bundle)}, the target {_reads(target)}: a draft model must read the same.")
    ours, theirs = target.manifest.model.vocab_size, bundle.manifest.model.vocab_size
    if ours != theirs:
        raise OptionError(f"{path} has {theirs} tokens in its vocabulary, the target {ours}: a draft model must share it.")
    return open_engine(bundle, "cpu", DRAFT_THREADS)


def _check_assistant(path: str | Path, assistant: Bundle, target: Bundle) -> None:
    starts = [bundle.manifest.generation.decoder_start_token_id for bundle in (target, assistant)]
    if assistant.manifest.model.encoder_sha256 != target.manifest.model.encoder_sha256 or starts[0] != starts[1]:
        raise OptionError(
            f"{path} is the assistant of another model: it reads the states of an encoder that {target.path} does not have. "
            f"Fix: export its checkpoint with --assistant-of {target.path}, or without, as a model with its own encoder."
        )


def _reads(bundle: Bundle) -> str:
    """The source's kind and shape, and the token that the output begins with."""
    manifest = bundle.manifest
    if not manifest.model.source:
        return "no source"
    shape = [size for size in manifest.graphs["encoder"].inputs[0].shape[1:] if isinstance(size, int)]
    return f"{manifest.model.source} of sizes {shape} after start token {manifest.generation.decoder_start_token_id}"

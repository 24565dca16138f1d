"""What users hold: a loaded bundle that turns prompts into text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from .budget import Budget
from .bundle import Bundle
from .drafters.base import Drafter, TunedDrafter
from .drafters.draft_model import DraftModelDrafter
from .drafters.first_that_pays import FirstThatPays
from .drafters.medusa import MedusaDrafter
from .drafters.ngram import NGramDrafter
from .engines.onnxruntime import DRAFT_THREADS, OnnxRuntimeEngine
from .engines.tensorrt import TENSORRT_DEVICES, TensorRtEngine
from .errors import OptionError, PromptError
from .loop import DecodingLoop, FinishReason, LoopOptions, Text
from .sampling import SamplingOptions
from .tokenizer import TextStream, Tokenizer
from .tuning import Tuning, read_tuning

DEVICES = ("cpu", "trt-rtx:sm89 (as it was built)", "tensorrt")
BuiltEngine = OnnxRuntimeEngine | TensorRtEngine


@dataclass(frozen=True)
class Stats:
    """What one generation cost. Times are of the whole batch it ran in.

    Attributes:
        drafter: the drafter used, "none" for plain decoding.
        verify_calls: target forwards after the prompt.
        acceptance_length: new tokens per verify call, the target's own token included; 1.0 is plain decoding.
        drafted_tokens: tree nodes verified.
        prefill_s, decode_s: seconds.
        tokens_per_s: new tokens after the first, per second of decoding.
    """

    drafter: str
    verify_calls: int
    acceptance_length: float
    drafted_tokens: int
    prefill_s: float
    decode_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Result:
    """One completed text: what was added to the prompt."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    stats: Stats


class Model:
    """A bundle on a device. One generation at a time: buffers are reused."""

    def __init__(
        self,
        bundle: Bundle,
        engine: BuiltEngine,
        tokenizer: Tokenizer,
        drafters: dict[str, Drafter],
        tuning: Tuning | None = None,
    ) -> None:
        self.bundle = bundle
        self.engine = engine
        self.tokenizer = tokenizer
        self.tuning = tuning
        self._drafters = drafters

    @property
    def drafters(self) -> list[str]:
        """Names `generate` takes, beside "auto" and "none": the bundle's heads first."""
        return list(self._drafters)

    @overload
    def generate(self, prompt: str, **options: Any) -> Result: ...

    @overload
    def generate(self, prompt: list[str], **options: Any) -> list[Result]: ...

    def generate(self, prompt: str | list[str], **options: Any) -> Result | list[Result]:
        """Complete one prompt, or a list of prompts as one batch.

        Args:
            prompt: text, or several texts.
            options: those of `stream`.

        Raises:
            PromptError: a prompt is empty or too long for the cache.
            OptionError: an option has a value it cannot have.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        generation = Generation(self, prompts, **options)
        for _ in generation.pieces():
            pass
        results = generation.results()
        return results[0] if isinstance(prompt, str) else results

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """Yield the completion piece by piece, never half a character and never part of a stop string.

        Args:
            prompt: the text to complete.
            max_new_tokens: the most tokens to add (128).
            drafter: "auto" (n-gram, until heads are tuned to the device), "none", or a name from `drafters`.
            draft_nodes: tree size; the drafter's default when None.
            temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram, seed: see SamplingOptions.
            stop: texts that end the completion; they are not part of it.
            ignore_end: go on after the model's end token.
        """
        for pieces in Generation(self, [prompt], **options).pieces():
            if pieces[0]:
                yield pieces[0]

    def drafter(self, name: str) -> Drafter | None:
        """The drafter of that name; None for "none". Raises OptionError for an unknown one."""
        if name == "auto":
            # Heads cost a graph and a larger verify pass, which only measuring can justify; n-grams cost next to nothing.
            name = "ngram" if self.tuning is None else self.tuning.chosen
            if "draft_model" in name and name not in self._drafters:
                raise OptionError(
                    f"Tuning chose {name}, and no draft model was loaded. Fix: --draft-model BUNDLE, or --drafter NAME."
                )
        if name == "none":
            return None
        if name not in self._drafters:
            raise OptionError(f"drafter {name!r} is unknown. Choose one of: auto, none, {', '.join(self._drafters)}.")
        return self._drafters[name]

    def budget(self, drafter: Drafter | None) -> Budget | None:
        """A sequence's budget for that drafter; None where nothing was tuned."""
        return None if drafter is None or self.tuning is None else self.tuning.budget(drafter.name)


class Generation:
    """One call of generate or stream: the loop, one text stream per prompt, and the results."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        drafter: str = "auto",
        draft_nodes: int | None = None,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
        **sampling: Any,
    ) -> None:
        if not prompts or not all(prompts):
            raise PromptError("The prompt is empty: decoding needs some text to start from.")
        rules = model.bundle.manifest.generation
        ends = frozenset() if ignore_end else frozenset(rules.eos_token_ids)
        self._drafter = model.drafter(drafter)
        chosen = _sampling_options(sampling, rules.suppress_tokens)
        options = LoopOptions(max_new_tokens, chosen, ends, draft_nodes, lambda: model.budget(self._drafter))
        self._tokenizer = model.tokenizer
        self._stop = [stop] if isinstance(stop, str) else list(stop)
        token_ids = [model.tokenizer.encode(prompt) for prompt in prompts]
        self._loop = DecodingLoop(model.engine, self._drafter, token_ids, options)
        self._streams = [TextStream(self._tokenizer, self._stop) for _ in prompts]
        self._texts = ["" for _ in prompts]

    def pieces(self) -> Iterator[list[str]]:
        """After each round, the text that became final for each prompt."""
        for emitted in self._loop.rounds():
            yield [self._show(text, tokens) for text, tokens in zip(self._loop.sequences, emitted, strict=True)]

    def _show(self, text: Text, tokens: list[int]) -> str:
        if not tokens:
            return ""
        stream = self._streams[text.row]
        piece = stream.push(tokens)
        if stream.stopped:
            text.finish_reason = "stop_string"
            del text.token_ids[text.prompt_tokens + stream.token_count :]
        if text.finish_reason is not None:
            piece += stream.finish()
        self._texts[text.row] += piece
        return piece

    def results(self) -> list[Result]:
        """What was generated, once `pieces` is exhausted."""
        return [self._result(text) for text in self._loop.sequences]

    def _result(self, text: Text) -> Result:
        assert text.finish_reason is not None
        return Result(
            self._texts[text.row],
            text.token_ids[text.prompt_tokens :],
            text.prompt_tokens,
            text.finish_reason,
            self._stats(text),
        )

    def _stats(self, text: Text) -> Stats:
        clock = self._loop.clock
        decoded = text.new_tokens - 1  # the first comes from the prompt's own forward
        return Stats(
            drafter=self._drafter.name if self._drafter else "none",
            verify_calls=text.verify_calls,
            acceptance_length=decoded / text.verify_calls if text.verify_calls else 1.0,
            drafted_tokens=text.drafted_tokens,
            prefill_s=clock.prefill_s,
            decode_s=clock.decode_s,
            tokens_per_s=decoded / clock.decode_s if clock.decode_s else 0.0,
        )


def _sampling_options(values: dict[str, Any], suppress_tokens: tuple[int, ...]) -> SamplingOptions:
    try:
        return SamplingOptions(suppress_tokens=suppress_tokens, **values)
    except TypeError as error:
        known = ", ".join(name for name in SamplingOptions.__dataclass_fields__ if name != "suppress_tokens")
        raise OptionError(f"unknown option ({error}). Sampling options are: {known}.") from error


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
        device: "cpu", or what the bundle was built for with TensorRT: "trt-rtx:sm89", "tensorrt".
        threads: of the engine; all cores when None.
        draft_model: another bundle with the same vocabulary, offered as the drafter "draft_model".
        tuned: use what `headstart tune` found; False takes fixed trees and n-grams for "auto".

    Raises:
        BundleError: no bundle, another schema, or a file that was edited.
        MissingExtraError: no engine is installed.
        OptionError: unknown device, or a draft model with another vocabulary.
        EngineError: the built engine or the tuning is of another bundle, machine or number of threads; or there is no GPU.
    """
    if device != "cpu" and device.split(":")[0] not in TENSORRT_DEVICES:
        raise OptionError(f"device {device!r} is unknown. Choose one of: {', '.join(DEVICES)}.")
    bundle = Bundle.load(path)
    engine = OnnxRuntimeEngine.open(bundle, threads) if device == "cpu" else TensorRtEngine.open(bundle, device)
    tuning = read_tuning(bundle, device, engine.built[0] if engine.built else None, engine.threads) if tuned else None
    draft_engine = None if draft_model is None else _draft_engine(draft_model, bundle)
    drafters = _drafters(bundle, engine, draft_engine, tuning)
    return Model(bundle, engine, Tokenizer.load(bundle.path / "tokenizer"), drafters, tuning)


def _drafters(
    bundle: Bundle, engine: BuiltEngine, draft_engine: OnnxRuntimeEngine | None, tuning: Tuning | None
) -> dict[str, Drafter]:
    """The bundle's heads, n-grams, the draft model, and the pairs that tuning measured; each believing its measured rates."""
    tuned: dict[str, TunedDrafter] = {}
    for name in bundle.manifest.heads:
        info = bundle.head(name)
        tuned[name] = MedusaDrafter(name, engine.head(info), info.heads)
    tuned["ngram"] = NGramDrafter()
    if draft_engine is not None:
        tuned["draft_model"] = DraftModelDrafter("draft_model", draft_engine)
    for name, found in (tuning.drafters if tuning else {}).items():
        parts = name.split("+")
        if any(part not in tuned for part in parts):
            continue  # tuned with a draft model that is not given this time
        if len(parts) > 1:
            tuned[name] = FirstThatPays(tuned[parts[0]], tuned[parts[1]], found.enough)
        tuned[name].use_rates(found.rates)
    return dict(tuned)


def _draft_engine(path: str | Path, target: Bundle) -> OnnxRuntimeEngine:
    bundle = Bundle.load(path)
    ours, theirs = target.manifest.model.vocab_size, bundle.manifest.model.vocab_size
    if ours != theirs:
        raise OptionError(f"{path} has {theirs} tokens in its vocabulary, the target {ours}: a draft model must share it.")
    return OnnxRuntimeEngine.open(bundle, DRAFT_THREADS)

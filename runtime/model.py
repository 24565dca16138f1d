"""What users hold: a loaded bundle that turns prompts into text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from .beam import BeamOptions, beam_search
from .budget import Budget, Standing
from .bundle import Bundle
from .drafters.aligned_copy import source_copy
from .drafters.base import Drafter, TunedDrafter
from .drafters.cascade import Cascade
from .drafters.draft_model import DraftModelDrafter
from .drafters.medusa import MedusaDrafter
from .drafters.ngram import NGramDrafter
from .engines.onnxruntime import CUDA_DEVICES, DRAFT_THREADS, OnnxRuntimeEngine
from .engines.tensorrt import TENSORRT_DEVICES, TensorRtEngine
from .errors import BundleError, OptionError, PromptError
from .generation import Generation, Prompt, Result, check_given, sampling_options
from .rules import TokenRules
from .tokenizer import Tokenizer
from .transcription import Caption, Recording, Transcriber, Transcript, live_captions, transcribe
from .tuning import DrafterTuning, Tuning, read_tuning

DEVICES = ("cpu", *CUDA_DEVICES, "trt-rtx:sm89 (as it was built)", "tensorrt")
BuiltEngine = OnnxRuntimeEngine | TensorRtEngine
# Sources that are no text.
ARRAYS = {"audio": "audio features", "states": "encoder states of the target whose assistant it is (load it as draft model)"}


@dataclass(frozen=True)
class Beam:
    """One of several completed texts; score: its log-probability under the length penalty, per token when that is 1."""

    text: str
    token_ids: list[int]
    score: float


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
        self._standings: dict[tuple[str, bool], Standing] = {}

    @property
    def drafters(self) -> list[str]:
        """Names `generate` takes, beside "auto" and "none": the bundle's heads first."""
        return list(self._drafters)

    @property
    def answers(self) -> bool:
        """Outputs answer a source and end of themselves; continuations are measured past end tokens, all equally long."""
        return bool(self.bundle.manifest.model.source)

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> Result: ...

    @overload
    def generate(self, prompt: list[str] | list[NDArray[Any]], **options: Any) -> list[Result]: ...

    @overload
    def generate(self, *, features: NDArray[Any], **options: Any) -> Result: ...

    @overload
    def generate(self, *, features: list[NDArray[Any]], **options: Any) -> list[Result]: ...

    def generate(
        self,
        prompt: Prompt | list[str] | list[NDArray[Any]] | None = None,
        *,
        features: NDArray[Any] | list[NDArray[Any]] | None = None,
        **options: Any,
    ) -> Result | list[Result]:
        """Complete one prompt, or a list of prompts as one batch. A model with an encoder reads the prompt as its source.

        Args:
            prompt: text, or several texts.
            features: float32 audio features of one source, or of several, in place of text (shape: `headstart inspect`).
            options: those of `stream`.

        Raises:
            PromptError: a prompt is empty or too long for the cache.
            OptionError: an option has a value it cannot have.
        """
        given = prompt if features is None else features
        prompts: Sequence[Prompt] = given if isinstance(given, list) else [] if given is None else [given]
        generation = Generation(self, prompts, **options)
        for _ in generation.pieces():
            pass
        results = generation.results()
        return results if isinstance(given, list) else results[0]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Yield the completion piece by piece, never half a character and never part of a stop string.

        Args:
            prompt: the text to complete; with an encoder, its source: text, a sound file of one window, or audio features.
            decoder_prompt: text or token ids that the output of an encoder-decoder begins with, behind its start token.
            max_new_tokens: the most tokens to add (128).
            drafter: "auto" (n-gram, until heads are tuned to the device), "none", or a name from `drafters`.
            draft_nodes: tree size; the drafter's default when None.
            temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram, seed: see SamplingOptions.
            hypotheses: per prompt, the token ids decoded of an earlier, shorter input; "auto" then drafts from them.
            stop: texts that end the completion; they are not part of it.
            ignore_end: go on after the model's end token.
            timestamps: apply Whisper's rules for them; the decoder prompt must not forbid them.
        """
        for pieces in Generation(self, [prompt], **options).pieces():
            if pieces[0]:
                yield pieces[0]

    def beam_search(
        self,
        prompt: Prompt,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | str | None = None,
        max_new_tokens: int = 128,
        decoder_prompt: str | Sequence[int] = (),
        **rules: Any,
    ) -> list[Beam]:
        """The most probable texts of one prompt, best first, without drafting: as `transformers.generate(num_beams=n)`.

        Args:
            prompt, decoder_prompt, max_new_tokens: see `stream`.
            num_beams, length_penalty, early_stopping: see BeamOptions; the checkpoint's own when None.
            rules: repetition_penalty, no_repeat_ngram.

        Raises:
            PromptError: the prompt is empty or too long for the cache.
            OptionError: an option has a value it cannot have.
        """
        stated = self.bundle.manifest.generation
        options = BeamOptions(
            num_beams=stated.num_beams if num_beams is None else num_beams,
            length_penalty=stated.length_penalty if length_penalty is None else length_penalty,
            early_stopping=stated.early_stopping if early_stopping is None else early_stopping,
            renormalize=stated.renormalize_logits,
            max_new_tokens=max_new_tokens,
            sampling=sampling_options(rules, stated),
            end_tokens=frozenset(stated.eos_token_ids),
            rules=TokenRules.of(stated),
        )
        check_given([prompt])
        source, token_ids = self.inputs(prompt, decoder_prompt)
        found = beam_search(self.engine, token_ids, options, source)
        return [Beam(self.tokenizer.decode(h.token_ids), h.token_ids, h.score) for h in found]

    def transcribe(
        self,
        recording: Recording,
        language: str | None = None,
        task: str = "transcribe",
        timestamps: bool | None = None,
        **options: Any,
    ) -> Transcript:
        """What is said in a recording of any length.

        Args:
            recording: a sound file, or [samples] at the model's rate (16 kHz): floats in -1 … 1, or integers.
            language: such as "en"; None lets a model of several languages hear which it is.
            task: "transcribe", or "translate" where the model can.
            timestamps: False for none, which only recordings within one window allow; None as the model can.
            options: those of `stream`.

        Raises:
            AudioError: no such file, not a sound file, empty, or truncated.
            MissingExtraError: a file was given and `headstart[audio]` is not installed.
            OptionError: the model reads no audio, or lacks the language, the task or timestamps.
            PromptError: the recording is longer than a model without timestamps reads at once.
        """
        return transcribe(Transcriber(self, language, task, timestamps, options), recording)

    def stream_audio(
        self, chunks: Iterable[NDArray[Any]], language: str | None = None, task: str = "transcribe", **options: Any
    ) -> Iterator[Caption]:
        """Live captions: one after each chunk of [samples], and a final one. Each draft is the caption before.

        Args: as `transcribe`.
        """
        return live_captions(Transcriber(self, language, task, None, options), chunks)

    def inputs(self, prompt: Prompt, decoder_prompt: str | Sequence[int] = ()) -> tuple[NDArray[Any] | None, list[int]]:
        """(what the encoder reads, None without one; the token ids the decoder starts from).

        Raises PromptError for text where audio is read, or the other way round, and for a decoder prompt without an encoder.
        """
        kind = self.bundle.manifest.model.source
        if isinstance(prompt, Path):
            source, start = Transcriber(self, None, "transcribe", False, {}).inputs(prompt)
            return source, self._decoder_start(decoder_prompt or start)
        if isinstance(prompt, str) == (kind in ARRAYS):
            wanted = ARRAYS.get(kind, "text")
            raise PromptError(f"{self.bundle.manifest.model.architecture} reads {wanted}, and the prompt is not.")
        if not kind and decoder_prompt:
            raise PromptError("This model has no encoder: it continues the prompt itself. Fix: leave the decoder prompt out.")
        if not kind:
            return None, self.tokenizer.encode(str(prompt))
        source = np.array(self.tokenizer.encode(prompt), np.int64) if isinstance(prompt, str) else np.asarray(prompt)
        return source, self._decoder_start(decoder_prompt)

    def _decoder_start(self, decoder_prompt: str | Sequence[int]) -> list[int]:
        start = self.bundle.manifest.generation.decoder_start_token_id
        if start is None:
            raise BundleError(f"{self.bundle.path} names no decoder_start_token_id. Fix: export the checkpoint again.")
        ids = self.tokenizer.encode(decoder_prompt, special=False) if isinstance(decoder_prompt, str) else list(decoder_prompt)
        return ids if ids[:1] == [start] else [start, *ids]

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

    def budget(self, drafter: Drafter | None, greedy: bool) -> Budget | None:
        """A sequence's budget for that drafter; None where nothing was tuned.

        What earlier texts showed of the drafter is kept, for greedy and sampled texts apart.
        """
        if drafter is None or self.tuning is None:
            return None
        standing = self._standings.setdefault((drafter.name, greedy), Standing())
        return self.tuning.budget(drafter.name, standing)


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
        threads: of the engine; all cores when None.
        draft_model: another bundle with the same vocabulary, offered as the drafter "draft_model".
        tuned: use what `headstart tune` found; False takes fixed trees and n-grams for "auto".

    Raises:
        BundleError: no bundle, another schema, or a file that was edited.
        MissingExtraError: no engine is installed.
        OptionError: unknown device, or a draft model with another vocabulary.
        EngineError: the built engine or the tuning is of another bundle, machine or number of threads; or there is no GPU.
    """
    with_onnxruntime = device in ("cpu", *CUDA_DEVICES)
    if not with_onnxruntime and device.split(":")[0] not in TENSORRT_DEVICES:
        raise OptionError(f"device {device!r} is unknown. Choose one of: {', '.join(DEVICES)}.")
    bundle = Bundle.load(path, check_hashes=False)  # the engine checks what it reads
    engine = OnnxRuntimeEngine.open(bundle, threads, device) if with_onnxruntime else TensorRtEngine.open(bundle, device)
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
    if bundle.manifest.model.source == "text":
        tuned["source_copy"] = source_copy()
    if draft_engine is not None:
        tuned["draft_model"] = DraftModelDrafter("draft_model", draft_engine)
    for name, found in (tuning.drafters if tuning else {}).items():
        if all(part in tuned for part in name.split("+")):  # else tuned with a draft model that is not given this time
            tuned[name] = with_rates(tuned, name, found)
    return dict(tuned)


def with_rates(drafters: Mapping[str, TunedDrafter], name: str, found: DrafterTuning) -> TunedDrafter:
    """The drafter of that name, or the pair that it names, believing the rates that were found."""
    parts = [drafters[part] for part in name.split("+")]
    drafter = parts[0] if len(parts) == 1 else Cascade(parts[0], parts[1], found.enough)
    drafter.use_rates(found.rates)
    return drafter


def _draft_engine(path: str | Path, target: Bundle) -> OnnxRuntimeEngine:
    bundle = Bundle.load(path, check_hashes=False)
    if bundle.manifest.model.source == "states":
        _check_assistant(path, bundle, target)
    elif _reads(target) != _reads(bundle):
        raise OptionError(f"{path} reads {_reads(bundle)}, the target {_reads(target)}: a draft model must read the same.")
    ours, theirs = target.manifest.model.vocab_size, bundle.manifest.model.vocab_size
    if ours != theirs:
        raise OptionError(f"{path} has {theirs} tokens in its vocabulary, the target {ours}: a draft model must share it.")
    return OnnxRuntimeEngine.open(bundle, DRAFT_THREADS)


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
    return f"{manifest.model.source} of sizes {shape} behind start token {manifest.generation.decoder_start_token_id}"

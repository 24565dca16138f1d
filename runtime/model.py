"""The public face of a loaded bundle: prompts in, text out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from .beam import BeamOptions, beam_search
from .bundle import Bundle
from .drafters.base import Drafter
from .errors import BundleError, PromptError
from .generation import Generation, Generator, Input, check_given
from .graph import Engine
from .options import DecodeOptions, GenerateOptions, most_new_tokens, sampling_options
from .results import Result
from .rules import TokenRules
from .scheduler import Scheduler
from .speech_options import Fallback, SpeechOptions
from .tokenizer import Tokenizer
from .transcriber import Recording, Transcriber
from .transcription import Caption, Transcript, live_captions, transcribe
from .tuning import Tuning

Prompt = str | Path | NDArray[Any]  # text; for encoders of speech a sound file of one window, or its features
# Sources other than text.
ARRAYS = {"audio": "audio features", "states": "encoder states of the target whose assistant it is (load it as draft model)"}


@dataclass(frozen=True)
class Beam:
    """One of several completed texts; score: its log-probability under the length penalty, per token when that is 1."""

    text: str
    token_ids: list[int]
    score: float


class Model:
    """A bundle on a device. Any number of threads and streams may use one at the same time: they share its rounds."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        tokenizer: Tokenizer,
        drafters: dict[str, Drafter],
        tuning: Tuning | None = None,
    ) -> None:
        self.bundle, self.engine, self.tokenizer, self.tuning = bundle, engine, tokenizer, tuning
        self.generator = Generator(bundle, engine, tokenizer, drafters, tuning)

    @property
    def drafters(self) -> list[str]:
        """Names that `generate` takes besides "auto" and "none": the bundle's heads first."""
        return list(self.generator.drafters)

    @property
    def scheduler(self) -> Scheduler:
        """For callers that add and cancel requests themselves; use it inside `generator.exclusive()`."""
        return self.generator.scheduler

    @property
    def answers(self) -> bool:
        """Outputs answer a source and end of themselves; continuations are measured past end tokens, all equally long."""
        return bool(self.bundle.manifest.model.source)

    @overload
    def generate(
        self, prompt: Prompt, *, decoder_prompt: str | Sequence[int] = (), **options: Unpack[GenerateOptions]
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[NDArray[Any]] | list[Prompt],
        *,
        decoder_prompt: str | Sequence[int] = (),
        **options: Unpack[GenerateOptions],
    ) -> list[Result]: ...

    @overload
    def generate(
        self, *, features: NDArray[Any], decoder_prompt: str | Sequence[int] = (), **options: Unpack[GenerateOptions]
    ) -> Result: ...

    @overload
    def generate(
        self, *, features: list[NDArray[Any]], decoder_prompt: str | Sequence[int] = (), **options: Unpack[GenerateOptions]
    ) -> list[Result]: ...

    def generate(
        self,
        prompt: Prompt | list[str] | list[NDArray[Any]] | list[Prompt] | None = None,
        *,
        features: NDArray[Any] | list[NDArray[Any]] | None = None,
        decoder_prompt: str | Sequence[int] = (),
        **options: Unpack[GenerateOptions],
    ) -> Result | list[Result]:
        """Complete one prompt, or several together. A model with an encoder reads the prompt as its source.

        Args:
            prompt: text, or several texts; with an encoder of speech a sound file of one window.
            features: float32 audio features of one source, or of several, in place of text (shape: `headstart inspect`).
            decoder_prompt: text or token ids that the output of an encoder-decoder begins with, after its start token.
            options: see GenerateOptions.

        Raises:
            PromptError: a prompt is empty or too long for the cache.
            OptionError: an option has a value it cannot have.
        """
        given = prompt if features is None else features
        prompts: Sequence[Prompt] = given if isinstance(given, list) else [] if given is None else [given]
        generation = self.start(prompts, decoder_prompt=decoder_prompt, **options)
        for _ in generation.pieces():
            pass
        results = generation.results()
        return results if isinstance(given, list) else results[0]

    def stream(
        self, prompt: Prompt, *, decoder_prompt: str | Sequence[int] = (), **options: Unpack[GenerateOptions]
    ) -> Iterator[str]:
        """Yield the completion piece by piece, never half a character and never part of a stop string.

        Args and errors: as `generate`. Abandoning the iterator cancels the generation.
        """
        for pieces in self.start([prompt], decoder_prompt=decoder_prompt, **options).pieces():
            if pieces[0]:
                yield pieces[0]

    def start(
        self,
        prompts: Sequence[Prompt],
        *,
        decoder_prompt: str | Sequence[int] = (),
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Queue prompts and return what yields their text and, at its end, their results. Args and errors: as `generate`."""
        check_given(prompts)
        return self.generator.start([self.input(prompt, decoder_prompt) for prompt in prompts], options)

    def beam_search(
        self,
        prompt: Prompt,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | str | None = None,
        max_new_tokens: int | None = None,
        decoder_prompt: str | Sequence[int] = (),
        repetition_penalty: float | None = None,
        no_repeat_ngram: int | None = None,
    ) -> list[Beam]:
        """The most probable texts of one prompt, best first, without drafting: as `transformers.generate(num_beams=n)`.

        Args:
            prompt, decoder_prompt: see `generate`.
            num_beams, length_penalty, early_stopping: see BeamOptions; the checkpoint's own when None.
            max_new_tokens, repetition_penalty, no_repeat_ngram: see GenerateOptions.

        Raises:
            PromptError: the prompt is empty or too long for the cache.
            OptionError: an option has a value it cannot have.
        """
        check_given([prompt])
        stated, given = self.bundle.manifest.generation, self.input(prompt, decoder_prompt)
        chosen: GenerateOptions = {"repetition_penalty": repetition_penalty, "no_repeat_ngram": no_repeat_ngram}
        options = BeamOptions(
            num_beams=stated.num_beams if num_beams is None else num_beams,
            length_penalty=stated.length_penalty if length_penalty is None else length_penalty,
            early_stopping=stated.early_stopping if early_stopping is None else early_stopping,
            renormalize=stated.renormalize_logits,
            max_new_tokens=most_new_tokens(max_new_tokens, stated, len(given.prompt_ids)),
            sampling=sampling_options(chosen, stated),
            end_tokens=frozenset(stated.eos_token_ids),
            rules=TokenRules.of(stated),
        )
        with self.generator.exclusive() as engine:
            hypotheses = beam_search(engine, given.prompt_ids, options, given.source)
        return [Beam(self.tokenizer.decode(h.token_ids), h.token_ids, h.score) for h in hypotheses]

    def transcribe(
        self,
        recording: Recording,
        language: str | None = None,
        task: str = "transcribe",
        timestamps: bool | None = None,
        *,
        initial_prompt: str = "",
        conditioned: bool = False,
        fallback: Fallback | None = Fallback(),  # noqa: B008  (frozen)
        voice_activity: bool = False,
        words: bool = False,
        **options: Unpack[DecodeOptions],
    ) -> Transcript:
        """What is said in a recording of any length.

        Args:
            recording: a sound file, or [samples] at the model's rate (16 kHz): floats in -1 … 1, or integers.
            language: such as "en"; None lets a model of several languages detect it.
            task: "transcribe", or "translate" where the model can.
            timestamps: False for none, which only recordings within one window allow; None as the model can.
            initial_prompt: text that the recording continues, for names and spelling.
            conditioned: each window reads the text before it, too; names stay the same, and a loop may go on.
            fallback: when a window is decoded again, and when it is silence; None for never.
            voice_activity: leave silence out first (models of 16 kHz; extra vad).
            words: when each word was said, from the checkpoint's alignment heads.
            options: see DecodeOptions.

        Raises:
            AudioError: no such file, not a sound file, empty, or truncated.
            MissingExtraError: a file was given and `headstart[audio]` is missing, or `headstart[vad]` for voice activity.
            OptionError: the model reads no audio, or lacks the language, the task, timestamps or a place for a prompt.
            PromptError: the recording is longer than a model without timestamps reads at once.
        """
        speech = SpeechOptions(language, task, timestamps, initial_prompt, conditioned, fallback, voice_activity, words)
        return transcribe(Transcriber(self.generator, speech, options), recording)

    def stream_audio(
        self,
        chunks: Iterable[NDArray[Any]],
        language: str | None = None,
        task: str = "transcribe",
        **options: Unpack[DecodeOptions],
    ) -> Iterator[Caption]:
        """Live captions: one after each chunk of [samples], and a final one. Each draft is the caption before.

        Args: as `transcribe`.
        """
        return live_captions(Transcriber(self.generator, SpeechOptions(language, task), options), chunks)

    def input(self, prompt: Prompt, decoder_prompt: str | Sequence[int] = ()) -> Input:
        """What a prompt is decoded from.

        Raises PromptError for text where audio is read, or the other way round, and for a decoder prompt without an encoder.
        """
        kind = self.bundle.manifest.model.source
        if isinstance(prompt, Path):
            given = Transcriber(self.generator, SpeechOptions(timestamps=False)).input(prompt)
            return given if not decoder_prompt else Input(self._decoder_start(decoder_prompt), given.source)
        if isinstance(prompt, str) == (kind in ARRAYS):
            wanted = ARRAYS.get(kind, "text")
            raise PromptError(f"{self.bundle.manifest.model.architecture} reads {wanted}, and the prompt is not.")
        if not kind and decoder_prompt:
            raise PromptError("This model has no encoder: it continues the prompt itself. Fix: leave the decoder prompt out.")
        if not kind:
            return Input(tuple(self.tokenizer.encode(str(prompt))))
        source = np.array(self.tokenizer.encode(prompt), np.int64) if isinstance(prompt, str) else np.asarray(prompt)
        return Input(self._decoder_start(decoder_prompt), source)

    def _decoder_start(self, decoder_prompt: str | Sequence[int]) -> tuple[int, ...]:
        start = self.bundle.manifest.generation.decoder_start_token_id
        if start is None:
            raise BundleError(f"{self.bundle.path} names no decoder_start_token_id. Fix: export the checkpoint again.")
        ids = self.tokenizer.encode(decoder_prompt, special=False) if isinstance(decoder_prompt, str) else list(decoder_prompt)
        return tuple(ids if ids[:1] == [start] else [start, *ids])

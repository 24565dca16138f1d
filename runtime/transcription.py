"""Speech to text for recordings of any length: windows, Whisper's timestamp seeking, and live captions.

A window is what the encoder reads at once. Longer recordings are read window by window, each beginning where the last
finished segment ended. Live captions read a growing recording again and again; the previous hypothesis is the draft.
Knows what goes into the decoder and comes out of it; `generation` decodes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .audio import Audio, Samples, load_audio
from .bundle import AudioInfo, GenerationRules
from .errors import OptionError, PromptError
from .generation import Generator, Input
from .options import DecodeOptions, GenerateOptions
from .prefill import last_logits, open_state, prefill
from .results import Result
from .segments import STEP_S, Segment, Span, split_window
from .states import SLOT_STEP

Recording = str | Path | NDArray[Any]  # a sound file, or samples as `load_audio` takes them


@dataclass(frozen=True)
class Transcript:
    """What was said.

    Attributes:
        text: all of it.
        segments: with times; one for the whole recording where the model writes no timestamps.
        language: the language's token without its brackets, "en"; empty where the model knows only one.
        duration_s: of the recording.
        notes: what had to be converted in the recording.
        windows: the decoding of each window, in order; its token ids hold the timestamps.
    """

    text: str
    segments: tuple[Segment, ...]
    language: str
    duration_s: float
    notes: tuple[str, ...]
    windows: tuple[Result, ...]


@dataclass(frozen=True)
class Caption:
    """The state of a recording that is still growing.

    Attributes:
        segments: final ones.
        hypothesis: the text after them, which may change with the next chunk; empty when `final`.
        heard_s: seconds of sound so far.
        final: the recording has ended.
        window: the decoding the hypothesis comes from; None when `final`.
    """

    segments: tuple[Segment, ...]
    hypothesis: str
    heard_s: float
    final: bool = False
    window: Result | None = None

    @property
    def text(self) -> str:
        return " ".join(part for part in (*(segment.text for segment in self.segments), self.hypothesis) if part)


class Transcriber:
    """Decodes the windows of one recording, with one language, task and set of options."""

    def __init__(
        self,
        generator: Generator,
        language: str | None = None,
        task: str = "transcribe",
        timestamps: bool | None = None,
        options: DecodeOptions | None = None,
    ) -> None:
        """Raises OptionError for a model that reads no audio, and for languages, tasks or timestamps it has no tokens for."""
        manifest = generator.bundle.manifest
        if manifest.audio is None:
            raise OptionError(f"{manifest.model.architecture} reads text, not speech. Fix: generate(prompt).")
        self._generator = generator
        self._options: DecodeOptions = options or {}
        self._audio: AudioInfo = manifest.audio
        self._rules: GenerationRules = manifest.generation
        has_times = self._rules.no_timestamps_token_id is not None
        if timestamps and not has_times:
            raise OptionError(f"{manifest.model.architecture} writes no timestamps. Fix: leave timestamps out.")
        self.timestamps = has_times if timestamps is None else timestamps
        self.language = self._language(language)
        self._task = self._task_ids(task)

    @property
    def sampling_rate(self) -> int:
        return self._audio.sampling_rate

    @property
    def window(self) -> int | None:
        """Samples the encoder reads at once; None is any number."""
        return self._audio.window

    def _language(self, language: str | None) -> str:
        """The language's token, "<|en|>"; empty where there is none to choose, or where it is not detected yet."""
        known = self._rules.lang_to_id
        if language is None:
            return next(iter(known)) if len(known) == 1 else ""
        token = language if language.startswith("<|") else f"<|{language}|>"
        if token not in known:
            names = ", ".join(sorted(name.strip("<|>") for name in known)) or "none to choose from"
            raise OptionError(f"language {language!r} is unknown to this model. It has: {names}.")
        return token

    def _task_ids(self, task: str) -> list[int]:
        known = self._rules.task_to_id
        if not known and task == "transcribe":
            return []
        if task not in known:
            raise OptionError(f"task {task!r} is unknown to this model. It has: {', '.join(sorted(known)) or 'transcribe'}.")
        return [known[task]]

    def prompt(self, timestamps: bool) -> list[int]:
        """What the decoder starts from: the start token, language, task, and whether times are wanted."""
        language = [self._rules.lang_to_id[self.language]] if self.language else []
        no_times = self._rules.no_timestamps_token_id
        return [self._start, *language, *self._task, *([] if timestamps or no_times is None else [no_times])]

    @property
    def _start(self) -> int:
        start = self._rules.decoder_start_token_id
        assert start is not None, "a model that reads audio has an encoder"
        return start

    def input(self, recording: Recording) -> Input:
        """What a recording within one window is decoded from, without timestamps.

        Raises AudioError, and PromptError for a longer recording.
        """
        audio = load_audio(recording, self.sampling_rate)
        self.check_length(audio)
        return self._input(audio.samples, timestamps=False)

    def _input(self, samples: Samples, timestamps: bool) -> Input:
        features = self._features(samples)
        self._detect_language(features)
        return Input(tuple(self.prompt(timestamps)), features)

    def check_length(self, audio: Audio) -> None:
        """Raises PromptError where a recording is longer than one window."""
        if self.window is not None and len(audio.samples) > self.window:
            raise PromptError(
                f"The recording has {audio.duration_s:.1f} s, and one window {self.window / self.sampling_rate:.0f} s. "
                "Fix: timestamps, where the model has them: longer recordings are read from one to the next."
            )

    def decode(self, samples: Samples, timestamps: bool, hypothesis: Sequence[int] = ()) -> Result:
        """Decode one window: at most `window` samples."""
        given = self._input(samples, timestamps)
        options: GenerateOptions = {**self._options, "timestamps": timestamps, "hypotheses": [hypothesis] if hypothesis else ()}
        if options.get("max_new_tokens") is None:
            options["max_new_tokens"] = self._generator.engine.model.max_cache - len(given.prompt_ids)
        generation = self._generator.start([given], options)
        for _ in generation.pieces():
            pass
        return generation.results()[0]

    def _features(self, samples: Samples) -> NDArray[np.float32]:
        """What the encoder reads: one window, filled up with silence."""
        if self.window is not None:
            samples = np.pad(samples, (0, self.window - len(samples)))
        with self._generator.exclusive() as engine:
            return engine.features(samples)

    def _detect_language(self, features: NDArray[np.float32]) -> None:
        """Choose the most probable language token after the start token, once, where the user named none."""
        known = self._rules.lang_to_id
        if self.language or not known:
            return
        with self._generator.exclusive() as engine:
            logits = last_logits(prefill(engine, open_state(engine, SLOT_STEP, features), [self._start]))
            self.language = max(known, key=lambda token: float(logits[known[token]]))

    def seek(self, samples: Samples) -> Iterator[tuple[list[Segment], Result]]:
        """Decode window by window with timestamps; each window's segments, times counted from the first sample."""
        assert self.window is not None
        at, step = 0, self.samples_per_step
        while len(samples) - at >= step:
            window = samples[at : at + self.window]
            result = self.decode(window, timestamps=True)
            spans, advance = self.spans(result.token_ids, len(window))
            yield self.segments(spans, at, len(samples)), result
            at += advance

    @property
    def samples_per_step(self) -> int:
        return round(STEP_S * self.sampling_rate)

    def spans(self, token_ids: Sequence[int], samples: int) -> tuple[list[Span], int]:
        """(the finished spans, samples until the next window begins) of a window of that many samples."""
        no_times = self._rules.no_timestamps_token_id
        assert no_times is not None
        text = [token for token in token_ids if token not in self._rules.eos_token_ids]
        spans, advance = split_window(text, no_times + 1, samples // self.samples_per_step)
        return spans, advance * self.samples_per_step

    def segments(self, spans: Sequence[Span], begin: int, end: int) -> list[Segment]:
        """The spans that hold text, of a window that begins at sample `begin` of a recording with `end` samples."""
        begin_s, end_s = begin / self.sampling_rate, end / self.sampling_rate
        found = []
        for span in spans:
            text = self._generator.tokenizer.decode(span.token_ids).strip()
            start, stop = (min(begin_s + steps * STEP_S, end_s) for steps in (span.start, span.end))
            if text:
                found.append(Segment(round(start, 2), round(stop, 2), text, span.token_ids))
        return found


def transcribe(transcriber: Transcriber, recording: Recording) -> Transcript:
    """All of a recording. Raises AudioError, and PromptError for one that is too long for a model without timestamps."""
    audio = load_audio(recording, transcriber.sampling_rate)
    if not transcriber.timestamps:
        transcriber.check_length(audio)
    if transcriber.timestamps and transcriber.window is not None:
        parts = list(transcriber.seek(audio.samples))
        segments = [segment for found, _ in parts for segment in found]
        results = tuple(result for _, result in parts)
    else:
        result = transcriber.decode(audio.samples, timestamps=False)
        segments, results = [Segment(0.0, round(audio.duration_s, 2), result.text.strip(), tuple(result.token_ids))], (result,)
    return _transcript(transcriber, audio, segments, results)


def _transcript(transcriber: Transcriber, audio: Audio, segments: Sequence[Segment], results: tuple[Result, ...]) -> Transcript:
    text = " ".join(segment.text for segment in segments)
    language = transcriber.language.strip("<|>")
    return Transcript(text, tuple(segments), language, audio.duration_s, audio.notes, results)


def live_captions(transcriber: Transcriber, chunks: Iterable[NDArray[Any]]) -> Iterator[Caption]:
    """A caption after each chunk, and a final one.

    While the sound fits a window it is decoded again with each chunk, without timestamps. When it no longer does, the
    window is decoded with them once, its finished segments become final, and the rest begins the next window.
    """
    segments: list[Segment] = []
    samples: Samples = np.zeros(0, np.float32)
    begin, hypothesis = 0, ""
    draft: Sequence[int] = ()
    for chunk in chunks:
        samples = np.concatenate([samples, load_audio(chunk, transcriber.sampling_rate).samples])
        while transcriber.window is not None and len(samples) > transcriber.window:
            found, advance = _settle(transcriber, samples[: transcriber.window], begin, draft)
            segments += found
            samples, begin, draft = samples[advance:], begin + advance, ()
        result = transcriber.decode(samples, False, draft)
        draft, hypothesis = result.token_ids, result.text.strip()
        yield Caption(tuple(segments), hypothesis, (begin + len(samples)) / transcriber.sampling_rate, window=result)
    rate = transcriber.sampling_rate
    last = Segment(round(begin / rate, 2), round((begin + len(samples)) / rate, 2), hypothesis)
    yield Caption((*segments, last) if hypothesis else tuple(segments), "", (begin + len(samples)) / rate, final=True)


def _settle(transcriber: Transcriber, window: Samples, begin: int, draft: Sequence[int]) -> tuple[list[Segment], int]:
    """(the finished segments of a full window, samples they cover)."""
    if not transcriber.timestamps:
        raise PromptError("The recording has become longer than one window, and this model writes no timestamps to go on from.")
    result = transcriber.decode(window, True, draft)
    spans, advance = transcriber.spans(result.token_ids, len(window))
    return transcriber.segments(spans, begin, begin + len(window)), advance

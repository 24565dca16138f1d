"""Windows of one recording decoded: prompts, languages, timestamps, and what is decoded again because its text looks wrong.

A window is what the encoder reads at once. Knows what goes into the decoder and comes out of it; `generation` decodes.
"""

from collections.abc import Iterator, Sequence
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
from .speech_options import Fallback, SpeechOptions, mean_log_prob
from .states import SLOT_STEP
from .word_alignment import check_alignment, words_of
from .word_times import Word

PREVIOUS, NO_SPEECH = "<|startofprev|>", ("<|nospeech|>", "<|nocaptions|>")  # Whisper's tokens
ENGLISH = "en"
LEAST_ADVANCE = 50  # steps of a window's timestamps: what hardly moves would be decoded for ever
DISTRUSTED = 0.5  # text decoded at a higher temperature is no context for the next window
Recording = str | Path | NDArray[Any]  # a sound file, or samples as `load_audio` takes them


class Transcriber:
    """Decodes the windows of one recording, with one language, task and set of options."""

    def __init__(
        self,
        generator: Generator,
        speech: SpeechOptions = SpeechOptions(),  # noqa: B008  (frozen)
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
        if speech.timestamps and not has_times:
            raise OptionError(f"{manifest.model.architecture} writes no timestamps. Fix: leave timestamps out.")
        self.speech = speech
        self.timestamps = has_times if speech.timestamps is None else speech.timestamps
        self.language = self._language(speech.language)
        self.languages: dict[str, float] = {}
        self._task = self._task_ids(speech.task)
        self._previous = self._initial_prompt(speech.initial_prompt)
        if speech.words:
            check_alignment(generator.engine)
        self._window: tuple[Samples, NDArray[np.float32]] | None = None  # the last one, and its features

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
        if language == ENGLISH and not known and self._rules.no_timestamps_token_id is not None:
            return ""  # a Whisper without languages is one for English
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

    def _initial_prompt(self, text: str) -> list[int]:
        if not text:
            return []
        if self._generator.tokenizer.id_of(PREVIOUS) is None:
            raise OptionError(f"this model has no token {PREVIOUS}, so it takes no initial prompt. Fix: leave it out.")
        return self._generator.tokenizer.encode(f" {text.strip()}", special=False)

    def prompt(self, timestamps: bool) -> list[int]:
        """What the decoder starts from: earlier text, the start token, language, task, and whether times are wanted."""
        previous = self._generator.tokenizer.id_of(PREVIOUS)
        most = self._generator.engine.model.max_cache // 2 - 1  # as Whisper: the rest is for the window's own text
        before = [previous, *self._previous[-most:]] if self._previous and previous is not None else []
        return [*before, *self._own_prompt(timestamps)]

    def _own_prompt(self, timestamps: bool) -> list[int]:
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

    def decode(
        self, samples: Samples, timestamps: bool, hypothesis: Sequence[int] = (), options: DecodeOptions | None = None
    ) -> Result:
        """Decode one window, at most `window` samples, once. `options`: in place of the transcriber's own."""
        given, own = self._input(samples, timestamps), self._options if options is None else options
        asked: GenerateOptions = {**own, "timestamps": timestamps, "hypotheses": [hypothesis] if hypothesis else ()}
        if asked.get("max_new_tokens") is None:
            asked["max_new_tokens"] = self._generator.engine.model.max_cache - len(given.prompt_ids)
        generation = self._generator.start([given], asked)
        for _ in generation.pieces():
            pass
        return generation.results()[0]

    def hear(self, samples: Samples, timestamps: bool) -> Result | None:
        """Decode one window until its text is good enough, see Fallback; None for silence."""
        fallback, options = self.speech.fallback, self._options
        if fallback is None or options.get("temperature"):
            return self.decode(samples, timestamps)
        tried: list[Result] = []
        for temperature in fallback.temperatures:
            drawn: DecodeOptions = {} if not temperature else {"temperature": temperature, "seed": options.get("seed") or 0}
            told: DecodeOptions = {**options, **drawn, "logprobs": options.get("logprobs") or 0}
            result = self.decode(samples, timestamps, options=told)
            if not fallback.repeats(result) and not fallback.improbable(result):
                return self._remembered(result, temperature)
            if not tried and fallback.improbable(result) and self._is_silent(samples, fallback):
                return None
            tried.append(result)
        best = max(tried, key=lambda result: (not fallback.repeats(result), mean_log_prob(result)))
        return self._remembered(best, max(fallback.temperatures))

    def _remembered(self, result: Result, temperature: float) -> Result:
        """The context of the next window, where it is to have one."""
        if self.speech.conditioned:
            own = [token for token in result.token_ids if token not in self._generator.tokenizer.special_ids]
            first_time = self._rules.no_timestamps_token_id
            text = [token for token in own if first_time is None or token < first_time]
            self._previous = [] if temperature > DISTRUSTED else [*self._previous, *text]
        return result

    def _is_silent(self, samples: Samples, fallback: Fallback) -> bool:
        """By the probability of the no-speech token after the start token."""
        known = [token for name in NO_SPEECH if (token := self._generator.tokenizer.id_of(name)) is not None]
        if fallback.no_speech is None or not known:
            return False
        logits = self._first_logits(self._features(samples)).astype(np.float64)
        probabilities = np.exp(logits - logits.max())
        return bool(probabilities[known[0]] / probabilities.sum() > fallback.no_speech)

    def _features(self, samples: Samples) -> NDArray[np.float32]:
        """What the encoder reads: one window, filled up with silence. A window that is read again is the same array, by which
        the engine knows that it is encoded already."""
        if self._window is None or self._window[0] is not samples:
            padded = samples if self.window is None else np.pad(samples, (0, self.window - len(samples)))
            with self._generator.exclusive() as engine:
                self._window = samples, engine.features(padded)
        return self._window[1]

    def _first_logits(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """[V] after the start token alone."""
        with self._generator.exclusive() as engine:
            return last_logits(prefill(engine, open_state(engine, SLOT_STEP, features), [self._start]))

    def _detect_language(self, features: NDArray[np.float32]) -> None:
        """Choose the most probable language token after the start token, once, where the user named none."""
        known = self._rules.lang_to_id
        if not self.language and known:
            logits = self._first_logits(features)[list(known.values())].astype(np.float64)
            shares = np.exp(logits - logits.max())
            found = dict(zip(known, (shares / shares.sum()).tolist(), strict=True))
            self.language = max(found, key=lambda token: found[token])
            best_first = sorted(found, key=lambda token: -found[token])
            self.languages = {token.strip("<|>"): round(found[token], 4) for token in best_first}

    def seek(self, samples: Samples) -> Iterator[tuple[list[Segment], Result]]:
        """Decode window by window with timestamps; each window's segments, times counted from the first sample."""
        assert self.window is not None
        at, step = 0, self.samples_per_step
        while len(samples) - at >= step:
            window = samples[at : at + self.window]
            result = self.hear(window, timestamps=True)
            if result is None:
                at += len(window)
                continue
            spans, advance = self.spans(result.token_ids, len(window))
            words = self._words(window, spans) if self.speech.words else None
            yield self.segments(spans, at, len(samples), words), result
            at += max(advance, LEAST_ADVANCE * step)

    @property
    def samples_per_step(self) -> int:
        return round(STEP_S * self.sampling_rate)

    def spans(self, token_ids: Sequence[int], samples: int) -> tuple[list[Span], int]:
        """(the finished spans, samples until the next window begins) of a window of that many samples."""
        spans, advance = split_window(self._text(token_ids), self._first_time, samples // self.samples_per_step)
        return spans, advance * self.samples_per_step

    def _text(self, token_ids: Sequence[int]) -> list[int]:
        """Without end tokens."""
        return [token for token in token_ids if token not in self._rules.eos_token_ids]

    @property
    def _first_time(self) -> int:
        """The token <|0.00|>."""
        no_times = self._rules.no_timestamps_token_id
        assert no_times is not None, "the model writes timestamps"
        return no_times + 1

    def segments(
        self, spans: Sequence[Span], begin: int, end: int, words: Sequence[Sequence[Word]] | None = None
    ) -> list[Segment]:
        """The spans that hold text, of a window that begins at sample `begin` of a recording with `end` samples.

        `words`: of each span, their times counted from the window's beginning.
        """
        begin_s, end_s = begin / self.sampling_rate, end / self.sampling_rate
        found = []
        for index, span in enumerate(spans):
            text = self._generator.tokenizer.decode(span.token_ids).strip()
            start, stop = (round(min(begin_s + steps * STEP_S, end_s), 2) for steps in (span.start, span.end))
            own = () if words is None else tuple(_later(word, begin_s, end_s) for word in words[index])
            if text:
                found.append(Segment(start, stop, text, span.token_ids, own))
        return found

    def _words(self, samples: Samples, spans: Sequence[Span]) -> list[list[Word]]:
        features, frames = self._features(samples), -(-len(samples) // self.samples_per_step)
        with self._generator.exclusive() as engine:
            prompt, language = self._own_prompt(timestamps=False), self.language.strip("<|>")
            return words_of(engine, self._generator.tokenizer, features, prompt, spans, frames, language)

    def whole(self, audio: Audio, result: Result) -> Segment:
        """One segment for a recording within a window, decoded without timestamps."""
        span = Span(0, len(audio.samples) // self.samples_per_step, tuple(self._text(result.token_ids)))
        words = self._words(audio.samples, [span])[0] if self.speech.words else []
        own = tuple(_later(word, 0.0, audio.duration_s) for word in words)
        return Segment(0.0, round(audio.duration_s, 2), result.text.strip(), tuple(result.token_ids), own)


def _later(word: Word, begin_s: float, end_s: float) -> Word:
    """Of a window that begins there, in a recording that ends there."""
    start, end = (round(min(begin_s + seconds, end_s), 2) for seconds in (word.start, word.end))
    return Word(start, end, word.text)

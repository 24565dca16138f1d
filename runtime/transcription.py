"""Speech to text for recordings of any length, and live captions.

Longer recordings than a window are read window by window, each beginning where the last finished segment ended. Live captions
read a growing recording again and again; the previous hypothesis is the draft.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .audio import Audio, Samples, load_audio
from .errors import PromptError
from .results import Result
from .segments import Segment
from .transcriber import Recording, Transcriber
from .voice_activity import Stretches, detect_speech
from .word_times import Word

Timed = TypeVar("Timed", Segment, Word)


@dataclass(frozen=True)
class Transcript:
    """What was said.

    Attributes:
        text: all of it.
        segments: with times; one for the whole recording where the model writes no timestamps.
        language: the language's token without its brackets, "en"; empty where the model knows only one.
        languages: probability of each language, the most probable first, where the first window was asked for it.
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
    languages: dict[str, float] = field(default_factory=dict)


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


def transcribe(transcriber: Transcriber, recording: Recording) -> Transcript:
    """All of a recording. Raises AudioError, and PromptError for one that is too long for a model without timestamps."""
    audio = load_audio(recording, transcriber.sampling_rate)
    if not transcriber.speech.voice_activity:
        return _whole(transcriber, audio)
    speech, rate = detect_speech(audio.samples, audio.sampling_rate), audio.sampling_rate
    spoken = speech.joined(audio.samples)
    if not len(spoken):
        return _transcript(transcriber, audio, (), ())
    found = _whole(transcriber, dataclasses.replace(audio, samples=spoken))
    segments = [
        dataclasses.replace(_put_back(one, speech, rate), words=tuple(_put_back(word, speech, rate) for word in one.words))
        for one in found.segments
    ]
    return _transcript(transcriber, audio, segments, found.windows)


def _put_back(one: Timed, speech: Stretches, rate: int) -> Timed:
    """With the times of the recording that silence was taken out of."""
    return dataclasses.replace(one, start=_moved(one.start, speech, rate), end=_moved(one.end, speech, rate))


def _moved(seconds: float, speech: Stretches, rate: int) -> float:
    return round(speech.original(round(seconds * rate)) / rate, 2)


def _whole(transcriber: Transcriber, audio: Audio) -> Transcript:
    if not transcriber.timestamps:
        transcriber.check_length(audio)
    if transcriber.timestamps and transcriber.window is not None:
        parts = list(transcriber.seek(audio.samples))
        segments = [segment for found, _ in parts for segment in found]
        return _transcript(transcriber, audio, segments, tuple(result for _, result in parts))
    result = transcriber.hear(audio.samples, timestamps=False)
    if result is None:
        return _transcript(transcriber, audio, (), ())
    return _transcript(transcriber, audio, [transcriber.whole(audio, result)], (result,))


def _transcript(transcriber: Transcriber, audio: Audio, segments: Sequence[Segment], results: tuple[Result, ...]) -> Transcript:
    text = " ".join(segment.text for segment in segments)
    language = transcriber.language.strip("<|>")
    return Transcript(text, tuple(segments), language, audio.duration_s, audio.notes, results, transcriber.languages)


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

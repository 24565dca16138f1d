"""Calibration and evaluation data: windows of a text that a decoder continues, or sources with their targets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.audio import load_audio
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import OptionError
from headstart.runtime.generation import Input
from headstart.runtime.loading import load
from headstart.runtime.model import Model, Prompt
from headstart.runtime.prompts import read_answers, text_of
from headstart.runtime.speech_options import SpeechOptions
from headstart.runtime.tokenizer import Tokenizer
from headstart.runtime.transcriber import Transcriber

WINDOW = 256  # tokens that attend to one another
LEAST = 64  # tokens of targets: less would prove nothing
KEYS = ("text", "prompt")  # of a JSON line; the first present one counts


@dataclass(frozen=True)
class Passage:
    """The input of one forward pass of a decoder, and of its encoder.

    Attributes:
        token_ids: [T] int64, the decoder's.
        given: number of prompt tokens among them; the others are to be predicted.
        source: what the encoder reads, as Engine.encode takes it; None without an encoder.
        prompt: the same as Model.generate takes it; empty without an encoder.
        target: the expected output, if known.
    """

    token_ids: NDArray[np.int64]
    given: int = 1
    source: NDArray[Any] | None = None
    prompt: Prompt = ""
    target: str | None = None

    @property
    def start(self) -> list[int]:
        """The decoder's prompt."""
        ids: list[int] = self.token_ids[: self.given].tolist()
        return ids


@dataclass(frozen=True)
class Answers:
    """Passages of an encoder-decoder.

    `left_out`: number of lines whose source exceeds the encoder's limit, or whose target exceeds the decoder's cache.
    """

    passages: tuple[Passage, ...]
    left_out: int


def calibration_passages(bundle: Bundle, data: Path, tokens: int) -> Sequence[Passage]:
    """The first `tokens` of the data, in the form that the bundle's model reads. Raises as the functions below."""
    if bundle.manifest.model.source:
        return read_answered(load(bundle.path, tuned=False), data, tokens).passages
    return of_windows(calibration_windows(bundle, data, tokens))


def of_windows(windows: NDArray[np.int64], given: int = 1) -> list[Passage]:
    """[windows, T] tokens of a text, of which the first `given` are not to be predicted."""
    return [Passage(window, given) for window in windows]


def calibration_windows(bundle: Bundle, data: Path, tokens: int) -> NDArray[np.int64]:
    """[windows, T] of the text's first tokens. Raises OptionError when the file has too little text, or none."""
    return text_windows(Tokenizer.load(bundle.path / "tokenizer"), data, bundle.manifest.model.max_cache, tokens, least=2)


def text_windows(tokenizer: Tokenizer, data: Path, longest: int, tokens: int, least: int = 1) -> NDArray[np.int64]:
    """[windows, T] tokens of a text file, T being WINDOW or `longest`; about `tokens` in all.

    Each window is a text of its own to the model, so each begins as the tokenizer begins a text: without its BOS, models that
    were trained with one give outputs that no user sees.

    Raises OptionError for a file with less text than `least` windows, or none.
    """
    opening = tokenizer.opening_ids
    window = min(WINDOW, longest)
    size = window - len(opening)
    ids = tokenizer.encode("\n".join(read_texts(data)), special=False)
    if len(ids) < least * size:
        raise OptionError(
            f"{data} holds {len(ids)} tokens; at least {least * size} are needed. "
            "Fix: more text of the kind that will be decoded."
        )
    count = max(1, min(len(ids) // size, tokens // window))
    texts = np.array(ids[: count * size], np.int64).reshape(count, size)
    return np.concatenate([np.tile(np.array(opening, np.int64), (count, 1)), texts], axis=1)


def read_texts(data: Path) -> list[str]:
    """A text file whole, or the "text" (or "prompt") of each JSON line. Raises OptionError for anything else."""
    try:
        content = data.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{data} cannot be read as UTF-8 text ({error}). Fix: a text file, or JSON Lines (.jsonl)."
        ) from error
    if data.suffix != ".jsonl":
        return [content]
    return [_text_of(data, number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]


def _text_of(data: Path, number: int, line: str) -> str:
    try:
        text = text_of(line, KEYS)
    except ValueError as error:
        raise OptionError(f"{data} line {number} is not JSON ({error}). Fix: one object a line.") from error
    if text is None:
        raise OptionError(
            f'{data} line {number} has no text under "text" or "prompt", found {line[:60]!r}. Fix: one such object a line.'
        )
    return text


def read_answered(model: Model, data: Path, tokens: int) -> Answers:
    """The file's sources, each with its target, until the decoder has read `tokens` of them.

    Where a line has no target, the model's own greedy output takes its place.

    Raises:
        PromptError: the file cannot be read, or has text where the model reads recordings.
        OptionError: it yields fewer than LEAST tokens.
    """
    passages: list[Passage] = []
    left_out, seen = 0, 0
    for given, target in read_answers(data):
        passage = _passage(model, given, target)
        if passage is None:
            left_out += 1
            continue
        passages.append(passage)
        seen += len(passage.token_ids)
        if seen >= tokens:
            break
    if seen < LEAST:
        rest = f", and {left_out} lines are longer than the model reads at once" if left_out else ""
        raise OptionError(
            f"{data} gives the decoder {seen} tokens to read; at least {LEAST} are needed{rest}. "
            "Fix: more sources of the kind that will be read."
        )
    return Answers(tuple(passages), left_out)


def _passage(model: Model, given: str | Path, target: str | None) -> Passage | None:
    """None for what is too long."""
    read = _input(model, given)
    if read is None or read.source is None:
        return None
    source, start = read.source, list(read.prompt_ids)
    prompt: Prompt = given if isinstance(given, str) else source
    if target is None:
        answer = model.generate(prompt, decoder_prompt=start, max_new_tokens=WINDOW).token_ids
    else:
        rules = model.bundle.manifest.generation
        first = [] if rules.forced_bos_token_id is None else [rules.forced_bos_token_id]
        answer = [*first, *model.tokenizer.encode(target, special=False), *rules.eos_token_ids[:1]]
    token_ids = np.array([*start, *answer], np.int64)
    if len(token_ids) > model.bundle.manifest.model.max_cache:
        return None
    return Passage(token_ids, len(start), source, prompt, target)


def _input(model: Model, given: str | Path) -> Input | None:
    """What it is decoded from; None for a source longer than the encoder reads at once."""
    if isinstance(given, str):
        read, limit = model.input(given), model.bundle.manifest.model.max_source
        return None if read.source is None or (limit and len(read.source) > limit) else read
    transcriber = Transcriber(model.generator, SpeechOptions(timestamps=False))
    samples = load_audio(given, transcriber.sampling_rate).samples
    if transcriber.window is not None and len(samples) > transcriber.window:
        return None
    return transcriber.input(samples)

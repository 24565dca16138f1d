"""Windows that are decoded again, silence, context from window to window, and recordings that hardly move on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from speech import RATE, recording

import headstart
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import OptionError
from headstart.runtime.model import Model
from headstart.runtime.results import Result, Stats
from headstart.runtime.sequence import TokenLogProbs
from headstart.runtime.speech_options import Fallback, SpeechOptions, compression_ratio, mean_log_prob
from headstart.runtime.transcriber import Transcriber

FIRST = 777  # <|0.00|>
STATS = Stats("none", 1, 1.0, 0, 0.0, 0.0, 0.0)
GOOD, LOOP = "it is eleven forty eight in the evening", "no no no no no no no no no no no no no no no no no no no no no no no"


def result(text: str, log_prob: float, token_ids: Sequence[int] = (10, 11, 12)) -> Result:
    ids = list(token_ids)
    return Result(text, ids, 3, "end", STATS, tuple(TokenLogProbs(token, log_prob) for token in ids))


@pytest.fixture(scope="module")
def model(speech_bundle: Bundle) -> Model:
    return headstart.load(speech_bundle.path)


class Scripted(Transcriber):
    """Answers by temperature, in place of a model's."""

    def __init__(self, model: Model, answers: dict[float, Result], speech: SpeechOptions, silent: bool = False) -> None:
        super().__init__(model.generator, speech)
        self.answers, self.silent, self.asked = answers, silent, []

    def decode(self, samples: Any, timestamps: bool, hypothesis: Any = (), options: Any = None) -> Result:
        self.asked.append((options or {}).get("temperature", 0.0))
        return self.answers[self.asked[-1]]

    def _is_silent(self, samples: Any, fallback: Fallback) -> bool:
        return self.silent


def test_figures_are_whispers() -> None:
    assert compression_ratio(LOOP) > 2.4 > compression_ratio(GOOD)
    assert mean_log_prob(result(GOOD, -0.4)) == pytest.approx(-0.4 * 3 / 4)


@pytest.mark.parametrize(
    ("answers", "asked", "kept"),
    [
        ({0.0: result(GOOD, -0.2)}, [0.0], 0.0),
        ({0.0: result(LOOP, -0.1), 0.2: result(GOOD, -0.5)}, [0.0, 0.2], 0.2),
        ({0.0: result(GOOD, -3.0), 0.2: result(LOOP, -0.1), 0.4: result(GOOD, -0.9)}, [0.0, 0.2, 0.4], 0.4),
        # None is good: of those that do not repeat themselves, the most probable.
        ({0.0: result(LOOP, -0.1), 0.2: result(GOOD, -2.0), 0.4: result(GOOD, -4.0)}, [0.0, 0.2, 0.4], 0.2),
    ],
)
def test_doubtful_text_is_decoded_again(model: Model, answers: dict[float, Result], asked: list[float], kept: float) -> None:
    speech = SpeechOptions(fallback=Fallback(temperatures=(0.0, 0.2, 0.4)))
    transcriber = Scripted(model, answers, speech)
    assert transcriber.hear(recording(1), timestamps=True) is answers[kept]
    assert transcriber.asked == asked


def test_a_doubtful_window_without_speech_is_silence(model: Model) -> None:
    doubtful, sure = {0.0: result(GOOD, -3.0)}, {0.0: result(GOOD, -0.2)}
    assert Scripted(model, doubtful, SpeechOptions(), silent=True).hear(recording(1), True) is None
    assert Scripted(model, sure, SpeechOptions(), silent=True).hear(recording(1), True) is sure[0.0]


def test_nothing_is_decoded_again_where_it_is_not_wanted(model: Model) -> None:
    answers = {0.0: result(LOOP, -9.0)}
    transcriber = Scripted(model, answers, SpeechOptions(fallback=None), silent=True)
    assert transcriber.hear(recording(1), True) is answers[0.0] and transcriber.asked == [0.0]
    whole = model.transcribe(recording(3), temperature=0.7, seed=1, drafter="none", max_new_tokens=4)
    assert len(whole.windows[0].token_ids) <= 4


def test_a_window_is_encoded_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is decoded, and though its language and its silence are asked for, too."""
    engine, runs = model.engine, []
    original = engine._encode  # type: ignore[attr-defined]
    monkeypatch.setattr(engine, "_encode", lambda source: runs.append(1) or original(source))
    model.transcribe(recording(3, 11), drafter="none", max_new_tokens=10)
    assert len(runs) == 1


def test_retries_are_repeatable(model: Model) -> None:
    """A random model's text is doubtful at every temperature."""
    first, again = (model.transcribe(recording(4), drafter="none", max_new_tokens=20) for _ in range(2))
    assert first.text == again.text
    plain = model.transcribe(recording(4), drafter="none", max_new_tokens=20, fallback=None)
    assert all(log.log_prob < 0 for log in first.windows[0].log_probs) and not plain.windows[0].log_probs


@pytest.mark.parametrize(("temperature", "context"), [(0.0, [10, 11]), (0.8, [])])
def test_text_is_the_next_windows_context(model: Model, temperature: float, context: list[int]) -> None:
    """Without its timestamps, and only where it was not drawn at a high temperature."""
    heard = {temperature: result(GOOD, -0.2, (FIRST, 10, 11, FIRST + 40))}
    speech = SpeechOptions(conditioned=True, fallback=Fallback(temperatures=(temperature,)))
    transcriber = Scripted(model, heard, speech)
    transcriber.hear(recording(1), True)
    start = Transcriber(model.generator).prompt(True)
    expected = [model.tokenizer.id_of("<|startofprev|>"), *context] if context else []
    assert transcriber.prompt(True) == [*expected, *start]


def test_an_initial_prompt_comes_before_the_start_token(model: Model) -> None:
    prompt = Transcriber(model.generator, SpeechOptions(initial_prompt="Elinor, Marianne")).prompt(False)
    begin = prompt.index(model.bundle.manifest.generation.decoder_start_token_id)
    assert prompt[0] == model.tokenizer.id_of("<|startofprev|>")
    assert model.tokenizer.decode(prompt[1:begin]).strip() == "Elinor, Marianne"
    long = Transcriber(model.generator, SpeechOptions(initial_prompt="Elinor, " * 400)).prompt(False)
    assert len(long) < model.engine.model.max_cache // 2 + 8
    heard = model.transcribe(recording(2), initial_prompt="Elinor", drafter="none", max_new_tokens=6, fallback=None)
    assert heard.windows[0].prompt_tokens > len(Transcriber(model.generator).prompt(True))


def test_times_that_hardly_move_end(model: Model) -> None:
    """Each window ends after 0.02 s, says its model: it goes on by a second, so that 20 s end."""
    answers = {0.0: result(GOOD, -0.2, (FIRST, 10, FIRST + 1, FIRST + 1, 11))}
    transcriber = Scripted(model, answers, SpeechOptions())
    windows = list(transcriber.seek(np.zeros(20 * RATE, np.float32)))
    assert len(windows) == 20


def test_a_model_without_the_token_takes_no_prompt(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.tokenizer), "id_of", lambda self, token: None)
    with pytest.raises(OptionError, match=r"takes no initial prompt\. Fix: leave it out"):
        model.transcribe(recording(1), initial_prompt="names")


def test_the_no_speech_token_decides_what_is_silent(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    transcriber = Transcriber(model.generator)
    token, size = model.tokenizer.id_of("<|nospeech|>"), model.bundle.manifest.model.vocab_size
    for probability in (0.9, 0.3):
        logits = np.full(size, np.log((1 - probability) / (size - 1)), np.float32)
        logits[token] = np.log(probability)
        monkeypatch.setattr(Transcriber, "_first_logits", lambda self, features, logits=logits: logits)
        assert transcriber._is_silent(recording(1), Fallback()) == (probability > 0.6)
    assert not transcriber._is_silent(recording(1), dataclasses.replace(Fallback(), no_speech=None))

"""Recordings to text against transformers: plain, with timestamps, over several windows; and as live captions.

The model is random, the shipped speech sample's tokenizer, front-end and generation rules are real.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from architectures import save_checkpoint, tiny_model
from speech import RATE, SPEECH, random_whisper, recording
from transformers import (
    GenerationConfig,
    GenerationMixin,
    Speech2TextFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

import headstart
from headstart.calibration.quantize import quantize
from headstart.exporter.build import build
from headstart.exporter.export import export
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import OptionError, PromptError
from headstart.runtime.model import Model
from headstart.runtime.prompts import read_inputs
from headstart.runtime.segments import split_window
from headstart.runtime.transcriber import LEAST_ADVANCE

WINDOW_S = 6
FIRST = 777  # <|0.00|>


@pytest.fixture(scope="module")
def model(speech_bundle: Bundle) -> Model:
    return headstart.load(speech_bundle.path)


def wanted_tokens(samples: Any, **options: Any) -> list[int]:
    """What transformers writes for the first window, without prompt and end token."""
    features = WhisperFeatureExtractor.from_pretrained(SPEECH)(samples, sampling_rate=RATE, return_tensors="pt")
    whisper = random_whisper()
    output = whisper.generate(features.input_features, language="en", task="transcribe", return_segments=True, **options)
    prompt = 3 if options.get("return_timestamps") else 4
    return without_end(output["segments"][0][0]["result"].tolist()[prompt:])


def without_end(tokens: list[int]) -> list[int]:
    return [token for token in tokens if token != GenerationConfig.from_pretrained(SPEECH).eos_token_id]


@pytest.mark.parametrize("drafter", ["none", "ngram"])
@pytest.mark.parametrize("timestamps", [False, True])
def test_a_window_equals_transformers(model: Model, timestamps: bool, drafter: str) -> None:
    for seed in range(2):
        samples = recording(4, seed)
        transcript = model.transcribe(samples, timestamps=timestamps, drafter=drafter, fallback=None)
        wanted = wanted_tokens(samples, return_timestamps=timestamps)
        assert without_end(transcript.windows[0].token_ids)[: len(wanted)] == wanted


def test_longer_recordings_go_on_from_the_last_finished_segment(model: Model) -> None:
    """The next window begins where transformers' reading of the timestamps says."""
    samples = recording(15, 7)
    transcript = model.transcribe(samples, drafter="none", fallback=None)
    at, texts = 0, []
    for window in transcript.windows:
        tokens = wanted_tokens(samples[at : at + WINDOW_S * RATE], return_timestamps=True)
        assert without_end(window.token_ids)[: len(tokens)] == tokens
        spans, advance = split_window(tokens, FIRST, min(len(samples) - at, WINDOW_S * RATE) // 320)
        texts += [span.token_ids for span in spans if span.token_ids]
        at += 320 * max(advance, LEAST_ADVANCE)
    assert at > len(samples) - 320
    assert [segment.token_ids for segment in transcript.segments] == texts
    starts = [segment.start for segment in transcript.segments]
    assert starts == sorted(starts)
    assert max(segment.end for segment in transcript.segments) <= 15.0  # whatever the model writes
    assert transcript.text == " ".join(segment.text for segment in transcript.segments)


def test_live_captions_end_with_what_the_whole_recording_says(model: Model) -> None:
    samples = recording(4)
    captions = list(model.stream_audio(np.array_split(samples, 4)))
    assert [round(caption.heard_s) for caption in captions] == [1, 2, 3, 4, 4]
    assert [caption.final for caption in captions] == [False] * 4 + [True]
    whole = model.transcribe(samples, timestamps=False, drafter="none", fallback=None).text
    assert captions[3].hypothesis == captions[4].text == whole


def test_live_captions_settle_when_a_window_is_full(model: Model) -> None:
    samples = recording(14, 3)
    captions = list(model.stream_audio(np.array_split(samples, 7)))
    assert captions[0].segments == () != captions[-1].segments
    for before, after in itertools.pairwise(captions):
        assert after.segments[: len(before.segments)] == before.segments  # what stands does not change


def test_the_previous_hypothesis_is_a_good_draft(model: Model) -> None:
    """Decoding the same sound again with its own text as the draft takes a fraction of the verify passes."""
    samples = recording(4)
    features = model.engine.features(np.pad(samples, (0, 2 * RATE)))
    options = {"features": features, "decoder_prompt": [770, 772, 776], "max_new_tokens": 64}
    first = model.generate(**options, drafter="none")
    again = model.generate(**options, hypotheses=[first.token_ids])
    assert again.token_ids == first.token_ids
    assert again.stats.verify_calls <= first.stats.verify_calls / 4


def test_a_wav_file_goes_in(model: Model) -> None:
    transcript = model.transcribe(SPEECH / "recordings" / "voice-5.wav")
    assert transcript.language == "en"
    assert transcript.notes == ()
    assert transcript.duration_s == pytest.approx(soundfile.info(SPEECH / "recordings" / "voice-5.wav").duration)


def test_int8_bundles_and_engines_keep_the_front_end(speech_bundle: Bundle, tmp_path: Path) -> None:
    quantize(speech_bundle.path, tmp_path / "int8")
    build(tmp_path / "int8")
    transcript = headstart.load(tmp_path / "int8").transcribe(recording(2), max_new_tokens=8, fallback=None)
    assert transcript.windows[0].token_ids


def test_a_sound_file_is_a_prompt(model: Model) -> None:
    """Whatever takes prompts takes recordings: verify, tune, bench."""
    inputs = read_inputs(SPEECH / "recordings" / "texts.jsonl")
    assert inputs[0] == SPEECH / "recordings" / "sentences-1.wav"
    found = model.generate(inputs[0], drafter="none", max_new_tokens=30)
    said = model.transcribe(inputs[0], drafter="none", max_new_tokens=30, timestamps=False, fallback=None)
    assert found.token_ids == said.windows[0].token_ids
    with pytest.raises(PromptError, match=r"one window 6 s"):
        model.generate(SPEECH / "recordings" / "long.wav")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "de"}, r"language 'de' is unknown to this model\. It has: en"),
        ({"task": "sing"}, r"task 'sing' is unknown to this model\. It has: transcribe, translate"),
    ],
)
def test_tokens_the_model_lacks(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        model.transcribe(recording(1), **options)


def with_languages(bundle: Bundle, folder: Path, languages: dict[str, int]) -> Model:
    """The model of a copy of the bundle that knows these languages."""
    shutil.copytree(bundle.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["generation"] |= {"lang_to_id": languages, "task_to_id": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return headstart.load(folder)


BRIEF: dict[str, Any] = {"max_new_tokens": 4, "fallback": None}


def test_languages_and_their_probabilities(speech_bundle: Bundle, tmp_path: Path) -> None:
    model = with_languages(speech_bundle, tmp_path / "two", {"<|en|>": 771, "<|de|>": 773, "<|fr|>": 774})
    heard = model.transcribe(recording(2), **BRIEF)
    assert set(heard.languages) == {"en", "de", "fr"} and heard.language == next(iter(heard.languages))
    assert sum(heard.languages.values()) == pytest.approx(1, abs=1e-3)
    assert list(heard.languages.values()) == sorted(heard.languages.values(), reverse=True)
    assert not model.transcribe(recording(2), language=heard.language, **BRIEF).languages  # not asked


def test_english_may_be_named_where_there_is_no_other(speech_bundle: Bundle, tmp_path: Path) -> None:
    """As callers of multilingual models do; Whisper's English checkpoints have no language tokens."""
    model = with_languages(speech_bundle, tmp_path / "english", {})
    heard = model.transcribe(recording(2), language="en", **BRIEF)
    assert heard.windows[0].token_ids == model.transcribe(recording(2), **BRIEF).windows[0].token_ids
    with pytest.raises(OptionError, match="language 'de' is unknown to this model"):
        model.transcribe(recording(2), language="de", **BRIEF)


def test_long_recordings_need_timestamps(model: Model) -> None:
    with pytest.raises(PromptError, match=r"has 7\.0 s, and one window 6 s"):
        model.transcribe(recording(7), timestamps=False)


def test_a_model_of_text_takes_no_recording(bundle_of: Callable[[str], Bundle]) -> None:
    with pytest.raises(OptionError, match="reads text, not speech"):
        headstart.load(bundle_of("llama").path).transcribe(recording(1))


@pytest.mark.parametrize(
    ("name", "extractor"),
    [
        ("moonshine", Wav2Vec2FeatureExtractor(do_normalize=False)),
        ("speech2text", Speech2TextFeatureExtractor(feature_size=20, num_mel_bins=20)),
    ],
)
def test_models_without_windows_read_recordings_whole(name: str, extractor: Any, tmp_path: Path) -> None:
    whisperless = tiny_model(name)
    save_checkpoint(whisperless, tmp_path / "checkpoint")
    extractor.save_pretrained(tmp_path / "checkpoint")
    model = headstart.load(export(tmp_path / "checkpoint", tmp_path / "bundle").path)
    samples = recording(1.5)
    transcript = model.transcribe(samples, drafter="none", max_new_tokens=12, ignore_end=True, fallback=None)
    features = extractor(samples, sampling_rate=RATE, return_tensors="pt")
    wanted = GenerationMixin.generate(
        whisperless, features[whisperless.main_input_name], max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert transcript.windows[0].token_ids == wanted[0, -12:].tolist()
    assert (transcript.segments[0].start, transcript.segments[0].end) == (0.0, 1.5)
    with pytest.raises(OptionError, match="writes no timestamps"):
        model.transcribe(samples, timestamps=True)

"""What is read when something is measured: targets where they are given, the model's own answers else, and what is too long."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from speech import RATE, recording

from headstart.calibration.passages import LEAST, read_answered
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import OptionError, PromptError
from headstart.runtime.loading import load

BundleOf = Callable[[str], Bundle]


def lines(file: Path, *records: dict[str, str]) -> Path:
    file.write_text("\n".join(map(json.dumps, records)), "utf-8")
    return file


def test_targets_end_and_what_has_none_is_answered(bundle_of: BundleOf, tmp_path: Path) -> None:
    model = load(bundle_of("t5").path)
    data = lines(tmp_path / "data.jsonl", {"prompt": "a source", "target": "so it is"}, {"text": "another source"})
    first, second = read_answered(model, data, 1000).passages
    assert first.token_ids.tolist() == [0, *model.tokenizer.encode("so it is", special=False), 2]
    assert (first.given, first.start, first.target, first.prompt) == (1, [0], "so it is", "a source")
    assert first.source is not None and first.source.tolist() == model.tokenizer.encode("a source")
    written = model.generate("another source", max_new_tokens=256, drafter="none")
    assert second.token_ids.tolist() == [0, *written.token_ids] and second.target is None


def test_no_more_is_read_than_asked_for(bundle_of: BundleOf, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", *[{"prompt": "a source", "target": "x" * 38}] * 9)
    read = read_answered(load(bundle_of("t5").path), data, 100)
    assert [len(passage.token_ids) for passage in read.passages] == [40, 40, 40]


def test_what_is_too_long_is_left_out(bundle_of: BundleOf, tmp_path: Path) -> None:
    long, short = "x" * 300, {"prompt": "a source", "target": "y" * 70}
    data = lines(tmp_path / "data.jsonl", {"prompt": long, "target": "y"}, short, {"prompt": "z", "target": long})
    read = read_answered(load(bundle_of("bart").path), data, 1000)
    assert [passage.target for passage in read.passages] == ["y" * 70] and read.left_out == 2


def test_recordings_are_heard_and_long_ones_left_out(speech_bundle: Bundle, tmp_path: Path) -> None:
    model = load(speech_bundle.path)
    assert speech_bundle.manifest.audio is not None and speech_bundle.manifest.audio.window is not None
    for name, seconds in (("short", 1.0), ("long", speech_bundle.manifest.audio.window / RATE + 1)):
        soundfile.write(tmp_path / f"{name}.wav", recording(seconds), RATE)
    records = [{"audio": f"{name}.wav", "text": "what is said " * 9} for name in ("long", "short", "short")]
    read = read_answered(model, lines(tmp_path / "data.jsonl", *records), 1000)
    heard, _ = read.passages
    assert read.left_out == 1 and heard.target == "what is said " * 9
    given = model.input(tmp_path / "short.wav")
    assert heard.source is not None and given.source is not None
    np.testing.assert_array_equal(heard.source, given.source)
    start = list(given.prompt_ids)
    assert heard.start == start and len(start) > 1, "language, task and no timestamps follow the start token"


def test_data_that_gives_too_little(bundle_of: BundleOf, tmp_path: Path) -> None:
    model = load(bundle_of("t5").path)
    with pytest.raises(OptionError, match=rf"gives the decoder 3 tokens to read; at least {LEAST} are needed\. Fix: "):
        read_answered(model, lines(tmp_path / "data.jsonl", {"prompt": "a", "target": "b"}), 1000)
    with pytest.raises(PromptError, match="line 1: an object with a text under"):
        read_answered(model, lines(tmp_path / "keys.jsonl", {"body": "a text under a key that nobody reads"}), 1000)

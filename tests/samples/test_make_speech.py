"""Passages for synthetic speech, and recordings of them; the programs that speak are replaced."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "samples" / "published"))  # where Python looks when it runs them

import make_speech
from make_speech import CHARACTERS, ESPEAK, FLITE, LONGEST_S, SAMPLING_RATE, Passage, noisy, passages, read_texts, recording

TEXT = "Call me Ishmael of the sea. -I thought I would sail about a little! It is a way I have; 123 456. " * 9


def test_what_is_said(tmp_path: Path) -> None:
    """Whole sentences that no program takes for an option, of a length that fits a window, in voices of both programs."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("Too short.")
    found = list(itertools.islice(passages(read_texts(tmp_path), np.random.default_rng(0)), 80))
    assert all(0 < len(passage.text) <= CHARACTERS[1] and passage.text[0].isalnum() for passage in found)
    assert {passage.command[0] for passage in found} == {"flite", "espeak-ng"}
    assert {passage.command[2] for passage in found} == {*FLITE, *ESPEAK}
    with pytest.raises(SystemExit, match=r"no \.txt file with sentences"):
        read_texts(tmp_path / "nothing")


def test_recordings_fill_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = itertools.cycle([9.0, 12.0, 40.0])

    def spoken(passage: Passage) -> np.ndarray:
        return np.sin(np.arange(int(next(lengths) * SAMPLING_RATE)) / 20).astype(np.float32)

    monkeypatch.setattr(make_speech, "spoken", spoken)
    source = itertools.repeat(Passage("a", ()))
    for seed in range(4):
        wave = recording(source, np.random.default_rng(seed))
        assert 9 <= len(wave) / SAMPLING_RATE <= LONGEST_S + 2 and np.isfinite(wave).all()


def test_half_of_the_speech_is_noisy() -> None:
    wave = np.zeros(SAMPLING_RATE, np.float32)
    wave[:100] = 0.5
    noise = [np.abs(noisy(wave, np.random.default_rng(seed))[200:]).max() > 0 for seed in range(40)]
    assert 10 < sum(noise) < 30


def test_missing_programs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_speech.py", str(tmp_path), str(tmp_path / "out")])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"flite is not installed\. Fix: apt-get install flite espeak-ng"):
        make_speech.main()
    assert not (tmp_path / "out").exists()

"""Speech to train a Whisper's draft heads on: passages of your texts, read by flite and espeak-ng, half of them with noise.

    python samples/published/make_speech.py TEXTS SPEECH --recordings 600

TEXTS is a folder of .txt files in English; both programs must be installed (apt-get install flite espeak-ng). Each recording
fills most of a window of 30 s with passages by different voices. Heads learn what the model writes, not what was said, so a
voice that it sometimes mishears does no harm. Recordings that are there already are kept: the same command goes on after an
interrupt.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

SAMPLING_RATE = 16_000  # Hz
LONGEST_S = 28.5  # a window is 30 s
PAUSE_S = (0.2, 1.0)  # after a passage
CHARACTERS = (60, 420)  # of a passage: 4 to 28 s
FLITE = ("slt", "rms", "awb", "kal16")
ESPEAK = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland")
NOISE_DB = (10, 35)  # below the speech

Wave = NDArray[np.float32]


@dataclass(frozen=True)
class Passage:
    text: str
    command: tuple[str, ...]  # that writes its speech to the file that is appended


def read_texts(folder: Path) -> list[list[str]]:
    """The sentences of each file that has some."""
    found = [sentences(file.read_text("utf-8", errors="replace")) for file in sorted(folder.rglob("*.txt"))]
    return [each for each in found if len(each) > 1] or sys.exit(f"{folder} has no .txt file with sentences")


def passages(files: list[list[str]], rng: np.random.Generator) -> Iterator[Passage]:
    """Without end: consecutive sentences from random places, in random voices."""
    weights = np.array([len(each) for each in files], np.float64)
    while True:
        chosen = files[int(rng.choice(len(files), p=weights / weights.sum()))]
        start, size = int(rng.integers(len(chosen))), int(rng.integers(*CHARACTERS))
        text = ""
        for sentence in chosen[start:]:
            if text and len(text) + len(sentence) > size:
                break
            text = f"{text} {sentence}".strip()
        if len(text) <= CHARACTERS[1]:
            yield Passage(text, voice(rng, text))


def sentences(text: str) -> list[str]:
    found = re.split(r"(?<=[.!?;])\s+", " ".join(text.split()))
    spoken = (sentence.lstrip("-–— ") for sentence in found)  # what begins with a dash would be an option to the programs
    return [sentence for sentence in spoken if re.search(r"[a-z]", sentence) and len(sentence) > 20]


def voice(rng: np.random.Generator, text: str) -> tuple[str, ...]:
    if rng.random() < 0.7:
        stretch = f"duration_stretch={rng.uniform(0.85, 1.15):.2f}"
        return ("flite", "-voice", str(rng.choice(FLITE)), "--setf", stretch, "-t", text, "-o")
    speed, pitch = str(rng.integers(130, 190)), str(rng.integers(30, 70))
    return ("espeak-ng", "-v", str(rng.choice(ESPEAK)), "-s", speed, "-p", pitch, text, "-w")


def spoken(passage: Passage) -> Wave:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run([*passage.command, file.name], check=True, stdout=subprocess.DEVNULL)
        wave, rate = soundfile.read(file.name, dtype="float32")
    resampled: Wave = soxr.resample(wave, rate, SAMPLING_RATE)
    return resampled


def noisy(wave: Wave, rng: np.random.Generator) -> Wave:
    """Half of them with pink noise, all at a level of their own."""
    if rng.random() < 0.5:
        spectrum = np.fft.rfft(rng.standard_normal(len(wave)))
        spectrum /= np.sqrt(np.arange(1, len(spectrum) + 1))
        noise = np.fft.irfft(spectrum, len(wave))
        wave = wave + noise / noise.std() * wave.std() * 10 ** (-rng.uniform(*NOISE_DB) / 20)
    level = rng.uniform(0.2, 0.9) / max(1e-6, float(np.abs(wave).max()))
    return (level * wave).astype(np.float32)


def recording(source: Iterator[Passage], rng: np.random.Generator) -> Wave:
    """Passages until the next one would not fit; that one is left out."""
    parts: list[Wave] = []
    for passage in source:
        wave = noisy(spoken(passage), rng)[: int(LONGEST_S * SAMPLING_RATE)]
        if sum(map(len, parts)) + len(wave) > LONGEST_S * SAMPLING_RATE:
            break
        parts += [wave, np.zeros(int(rng.uniform(*PAUSE_S) * SAMPLING_RATE), np.float32)]
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("speech", type=Path)
    parser.add_argument("--recordings", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for program in ("flite", "espeak-ng"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is not installed. Fix: apt-get install flite espeak-ng")
    args.speech.mkdir(parents=True, exist_ok=True)
    texts = read_texts(args.texts)
    for number in range(args.recordings):
        file = args.speech / f"{number:05}.wav"
        if not file.is_file():
            rng = np.random.default_rng([args.seed, number])
            partial = file.with_suffix(".partial")
            soundfile.write(partial, recording(passages(texts, rng), rng), SAMPLING_RATE, "PCM_16", format="WAV")
            partial.rename(file)
        if number % 100 == 99:
            print(f"{number + 1} of {args.recordings}", flush=True)


if __name__ == "__main__":
    main()

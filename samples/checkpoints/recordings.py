"""Held-out recordings for the speech sample: sentences it never read, in voices it knows and in one it never heard.

    python samples/checkpoints/recordings.py

writes the few that are shipped, and their texts. The same functions make the sets that its word error rate is measured on:
each recording depends on its set and number alone.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from commands import sentences
from synthesis import HELD_OUT_VARIANT, SAMPLING_RATE, VARIANTS, Synthesizer, random_voice
from windows import coloured_noise

OUTPUT = Path(__file__).parent / "speech" / "recordings"
SETS = {"held-out sentences": VARIANTS, "held-out voice": (HELD_OUT_VARIANT,)}
SHIPPED = 5  # short ones of each set
LONG = 5  # sentences of the long recording
SILENCE_S = 0.2  # before and behind each


@dataclass(frozen=True)
class Recording:
    samples: np.ndarray  # [samples] float32 at SAMPLING_RATE
    text: str
    voice: str
    noise_db: int | None  # how far the noise lies below the speech; None without noise


def recordings(name: str, count: int) -> Iterator[Recording]:
    """The first `count` of a set, every second with noise. Sentences are held out in both sets."""
    synthesizer, seed = Synthesizer(), list(SETS).index(name)
    for number, text in enumerate(sentences(count, held_out=True, seed=10 + seed)):
        rng = np.random.default_rng([seed, number])
        voice = random_voice(rng, SETS[name])
        wave = with_silence(synthesizer.speak(text, voice).wave)
        noise_db = int(rng.integers(15, 31)) if number % 2 else None
        yield Recording(noisy(rng, wave, noise_db), text, f"{voice.accent}+{voice.variant}", noise_db)


def long_recording(count: int = LONG) -> Recording:
    """Sentences by several voices behind one another, longer than the model's window."""
    parts = list(recordings("held-out sentences", 100 + count))[100:]
    text = " ".join(part.text for part in parts)
    return Recording(np.concatenate([part.samples for part in parts]), text, "several", None)


def with_silence(wave: np.ndarray) -> np.ndarray:
    silence = np.zeros(int(SILENCE_S * SAMPLING_RATE), np.float32)
    return np.concatenate([silence, wave, silence])


def noisy(rng: np.random.Generator, wave: np.ndarray, noise_db: int | None) -> np.ndarray:
    if noise_db is not None:
        wave = wave + coloured_noise(rng, len(wave)) * wave.std() * 10 ** (-noise_db / 20)
    return (0.7 * wave / np.abs(wave).max()).astype(np.float32)


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    shipped = {f"{name.split()[-1]}-{i}": part for name in SETS for i, part in enumerate(recordings(name, SHIPPED), 1)}
    shipped["long"] = long_recording()
    lines = []
    for name, recording in shipped.items():
        soundfile.write(OUTPUT / f"{name}.wav", recording.samples, SAMPLING_RATE, "PCM_16")
        facts = {"audio": f"{name}.wav", "text": recording.text, "voice": recording.voice, "noise_db": recording.noise_db}
        lines.append(json.dumps(facts | {"class": name.split("-")[0]}))
    (OUTPUT / "texts.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

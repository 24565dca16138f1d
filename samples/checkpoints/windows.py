"""The speech sample's training windows: six seconds of speech with noise, as log-mels, and what Whisper should write.

Sentences are synthesised once; their mel power spectra are kept. A window places one to three of them in time, adds
noise (powers of independent sounds add up), and is labelled in one of Whisper's two ways: with timestamps, where the
part of a sentence that the window's end cuts off has only its start; or without, where a recording that stops between
two words is written as far as it goes. The second is what live captions ask for.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from commands import sentences
from synthesis import SAMPLING_RATE, Synthesizer, random_voice
from transformers import WhisperFeatureExtractor, WhisperTokenizer

WINDOW_S = 6
FRAMES = 100 * WINDOW_S  # of 10 ms
FLOOR = -10.0  # log10 of the least power that Whisper's features know
UTTERANCES = 20_000
IGNORED = -100


def feature_extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(chunk_length=WINDOW_S)


def mel_powers(wave: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """[frames, 80] float16: log10 of the mel powers, as WhisperFeatureExtractor has them before it scales them."""
    spectrum = torch.stft(torch.from_numpy(wave), 400, 160, window=torch.hann_window(400), return_complex=True)
    powers = torch.from_numpy(filters).float().T @ spectrum[:, :-1].abs() ** 2
    return powers.clamp(min=10**FLOOR).log10().T.half().numpy()


def make_utterances(work: Path) -> None:
    """Synthesise the training sentences into `work`: mels.npy (all frames behind one another), utterances.pt (the rest)."""
    synthesizer, rng, filters = Synthesizer(), np.random.default_rng(0), feature_extractor().mel_filters
    mels, texts, words = [], [], []
    for text in sentences(UTTERANCES, held_out=False, seed=0):
        utterance = synthesizer.speak(text, random_voice(rng))
        mel = mel_powers(utterance.wave, filters)
        if len(mel) <= FRAMES - 20:
            mels.append(mel)
            texts.append(text)
            words.append(utterance.words)
    np.save(work / "mels.npy", np.concatenate(mels))
    torch.save({"texts": texts, "words": words, "lengths": [len(mel) for mel in mels]}, work / "utterances.pt")


def coloured_noises(count: int = 48, seed: int = 0) -> np.ndarray:
    """[count, FRAMES, 80] log10 powers of six seconds of noise each, from white to brown."""
    rng, filters = np.random.default_rng(seed), feature_extractor().mel_filters
    return np.stack([mel_powers(coloured_noise(rng, WINDOW_S * SAMPLING_RATE), filters) for _ in range(count)])


def coloured_noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    """[samples] float32 of deviation 1: power falls with frequency to the power of 0 (white) to 2 (brown)."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    spectrum /= np.maximum(np.arange(len(spectrum)), samples / 400) ** rng.uniform(0, 1)  # flat below 40 Hz
    noise = np.fft.irfft(spectrum, samples)
    return (noise / noise.std()).astype(np.float32)


@dataclass(frozen=True)
class Placed:
    """An utterance in a window, in frames; `text` is None for one that the window's end cuts off."""

    utterance: int
    text: str | None
    start: int
    end: int


class Windows:
    """An endless, reproducible supply: window i depends on i alone."""

    def __init__(self, work: Path, tokenizer: WhisperTokenizer) -> None:
        kept = torch.load(work / "utterances.pt", weights_only=True)
        self.texts, self.words = kept["texts"], kept["words"]
        self.offsets = np.concatenate([[0], np.cumsum(kept["lengths"])])
        self.mels = np.load(work / "mels.npy", mmap_mode="r")
        self.noises = coloured_noises()
        self.tokenizer = tokenizer
        self.vocabulary = {word: index for index, word in enumerate(sorted(set(" ".join(self.texts).split())))}

    def mel(self, utterance: int) -> np.ndarray:
        return self.mels[self.offsets[utterance] : self.offsets[utterance + 1]].astype(np.float32)

    def __getitem__(self, index: int) -> tuple[np.ndarray, list[int], np.ndarray]:
        """(features [80, FRAMES] float32, the decoder's tokens, the word spoken in each encoder frame [FRAMES // 2])."""
        rng = np.random.default_rng([1, index])
        timestamps = rng.random() < 0.5
        window, placed = np.full((FRAMES, 80), FLOOR, np.float32), []
        if rng.random() > 0.02:  # the others are silence
            placed = self._place(rng, window, timestamps)
        sounding = max((part.end for part in placed), default=FRAMES)
        self._add_noise(rng, window, sounding)
        return self._features(rng, window), self._tokens(placed, timestamps), self._spoken(placed)

    def _place(self, rng: np.random.Generator, window: np.ndarray, timestamps: bool) -> list[Placed]:
        placed: list[Placed] = []
        wanted, at = rng.choice([1, 2, 3], p=[0.35, 0.4, 0.25]), 0
        while len(placed) < wanted:
            at += int(rng.integers(0, 30 if placed or rng.random() < 0.6 else 150)) + 8 * bool(placed)
            utterance = int(rng.integers(len(self.texts)))
            mel, text = self.mel(utterance), self.texts[utterance]
            if not timestamps and rng.random() < 0.2:
                mel, text = self._until_a_word(rng, utterance, mel)
                wanted = len(placed) + 1  # the recording stops here
            if at + len(mel) > FRAMES:
                if placed and timestamps and at < FRAMES - 20 and rng.random() < 0.7:
                    window[at:] = mel[: FRAMES - at] + rng.uniform(-1.5, 0.3)
                    placed.append(Placed(utterance, None, at, FRAMES))
                if placed:
                    break
                at = int(rng.integers(0, FRAMES - len(mel) + 1))
            window[at : at + len(mel)] = np.maximum(mel + rng.uniform(-1.5, 0.3), FLOOR)
            placed.append(Placed(utterance, text, at, at + len(mel)))
            at += len(mel)
        return placed

    def _until_a_word(self, rng: np.random.Generator, utterance: int, mel: np.ndarray) -> tuple[np.ndarray, str]:
        """The utterance stopped before one of its words (but the first), up to 80 ms into the next one."""
        cuts = [(said, time) for said, time in self.words[utterance] if said > 0 and time > 0.2]
        if not cuts:
            return mel, self.texts[utterance]
        said, time = cuts[rng.integers(len(cuts))]
        return mel[: int(100 * (time + rng.uniform(0, 0.08)))], self.texts[utterance][:said].strip()

    def _add_noise(self, rng: np.random.Generator, window: np.ndarray, sounding: int) -> None:
        if rng.random() < 0.4:
            return
        until = FRAMES if rng.random() < 0.5 else min(FRAMES, sounding + int(rng.integers(0, 100)))
        noise = self.noises[rng.integers(len(self.noises))].astype(np.float32)
        noise = np.roll(noise, int(rng.integers(FRAMES)), axis=0)[:until]
        loudness = np.log10(np.mean(10 ** window[:until]) + 1e-9) if window.max() > FLOOR else -3.0
        level = loudness - np.log10(np.mean(10**noise)) - rng.uniform(1.2, 3.5)  # 12 to 35 dB below the speech
        window[:until] = np.log10(10 ** window[:until] + 10 ** (noise + level))

    def _features(self, rng: np.random.Generator, window: np.ndarray) -> np.ndarray:
        """Whisper's scaling, after a random tilt of the spectrum; then SpecAugment (arXiv 1904.08779), masks kept short."""
        window = np.maximum(window + rng.uniform(-0.4, 0.4) * np.linspace(-1, 1, 80, dtype=np.float32), FLOOR)
        features = (np.maximum(window, window.max() - 8.0) + 4.0) / 4.0
        for axis, longest, masks in ((0, 10, 2), (1, 10, 2)):
            for _ in range(rng.integers(masks + 1)):
                length = int(rng.integers(1, longest + 1))
                start = int(rng.integers(features.shape[axis] - length))
                features[(slice(None),) * axis + (slice(start, start + length),)] = features.mean()
        return np.ascontiguousarray(features.T, dtype=np.float32)

    def _tokens(self, placed: list[Placed], timestamps: bool) -> list[int]:
        prefix = ["<|startoftranscript|>", "<|en|>" if placed else "<|nospeech|>", "<|transcribe|>"]
        ids = self.tokenizer.convert_tokens_to_ids(prefix if timestamps else [*prefix, "<|notimestamps|>"])
        for part in placed:
            words = self.tokenizer.encode(" " + part.text, add_special_tokens=False) if part.text else []
            if timestamps:
                times = [part.start, part.end] if part.text else [part.start]
                first, *last = [self.tokenizer.convert_tokens_to_ids(f"<|{round(t / 2) * 0.02:.2f}|>") for t in times]
                words = [first, *words, *last]
            ids += words
        return [*ids, self.tokenizer.eos_token_id]

    def _spoken(self, placed: list[Placed]) -> np.ndarray:
        """[FRAMES // 2] int64: the word's number; the last number is silence."""
        spoken = np.full(FRAMES // 2, len(self.vocabulary))
        for part in placed:
            for said, time in self.words[part.utterance]:  # each word stands until the next one begins
                word = self.texts[part.utterance][said:].split()[0]
                begin = part.start + max(0, round(100 * time))
                spoken[begin // 2 : part.end // 2] = self.vocabulary[word]
        return spoken


def batch(windows: Windows, first: int, size: int) -> dict[str, torch.Tensor]:
    """Windows first … first + size: features [B, 80, FRAMES], tokens [B, T] padded with IGNORED, spoken [B, FRAMES // 2]."""
    features, tokens, spoken = zip(*(windows[index] for index in range(first, first + size)), strict=True)
    width = max(map(len, tokens))
    return {
        "features": torch.from_numpy(np.stack(features)),
        "tokens": torch.tensor([row + [IGNORED] * (width - len(row)) for row in tokens]),
        "spoken": torch.from_numpy(np.stack(spoken)),
    }

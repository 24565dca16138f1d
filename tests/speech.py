"""A tiny random Whisper with the shipped speech sample's tokenizer, front-end and generation rules; and something to hear."""

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

SPEECH = Path(__file__).parents[1] / "samples" / "checkpoints" / "speech"
RATE = 16_000


@functools.cache
def random_whisper() -> Any:
    settings = WhisperConfig.from_pretrained(SPEECH).to_dict()
    settings |= {"d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    settings |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)  # spread logits: greedy decoding has no near-ties
    model.generation_config = GenerationConfig.from_pretrained(SPEECH)
    return model.eval()


def save_speech_checkpoint(folder: Path) -> None:
    random_whisper().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(SPEECH / name, folder)


def recording(seconds: float, seed: int = 0) -> Any:
    """Noise of changing loudness and colour."""
    generator = np.random.default_rng(seed)
    wave = generator.standard_normal(int(RATE * seconds))
    wave = np.convolve(wave, generator.standard_normal(5), "same") * np.repeat(generator.random(int(10 * seconds)), RATE // 10)
    return (0.1 * wave).astype(np.float32)

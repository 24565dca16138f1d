"""What the encoder of a Whisper reads of a WAV file. numpy, and for `log_mel` transformers."""

import wave
from pathlib import Path
from typing import Any


def samples_of(file: str) -> Any:
    """[samples] float32 of a 16-bit mono file."""
    import numpy as np

    with wave.open(file) as sound:
        return np.frombuffer(sound.readframes(sound.getnframes()), np.int16).astype(np.float32) / 32768


def filled(samples: Any, window: int) -> Any:
    """[window] with silence behind the samples; as they are where they are longer."""
    import numpy as np

    return np.pad(samples, (0, max(0, window - len(samples))))


def log_mel(folder: str, file: str) -> Any:
    """[1, mels, frames] float32 of one window, by the settings in the folder's preprocessor_config.json."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    return extractor(samples_of(file), sampling_rate=extractor.sampling_rate, return_tensors="np").input_features


def is_speech(folder: str) -> bool:
    """Whether a checkpoint, or what was converted from one, reads recordings."""
    return Path(folder, "preprocessor_config.json").is_file()

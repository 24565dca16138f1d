"""The front-end's graph against transformers' feature extractors, on speech-like noise."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from transformers import Speech2TextFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from headstart.exporter.frontend import frontend
from headstart.exporter.graph import save_graph
from headstart.runtime.contract import AUDIO
from headstart.runtime.errors import CheckpointError


def recording(seconds: float, seed: int = 0) -> Any:
    """Noise that swells and fades, with a tone in it, silent at its end."""
    generator, samples = np.random.default_rng(seed), int(16_000 * seconds)
    time = np.arange(samples) / 16_000
    wave = 0.2 * generator.standard_normal(samples) * np.sin(2 * time) ** 2 + 0.3 * np.sin(2 * np.pi * 300 * time)
    wave[-2000:] = 0
    return wave.astype(np.float32)


def features_of(extractor: Any, folder: Path, waves: Any) -> Any:
    """Through the graph that a checkpoint with this extractor gets."""
    extractor.save_pretrained(folder)
    _, graph = frontend(folder)
    save_graph(graph, folder / "frontend.onnx")
    return ort.InferenceSession(folder / "frontend.onnx").run(None, {AUDIO: waves})[0]


@pytest.mark.parametrize("options", [{}, {"feature_size": 128}, {"chunk_length": 6}])
def test_whisper(options: dict[str, int], tmp_path: Path) -> None:
    extractor = WhisperFeatureExtractor(**options)
    waves = [recording(5, 1), recording(3.7, 2)]
    wanted = extractor(waves, sampling_rate=16_000, return_tensors="np").input_features
    padded = np.stack([np.pad(wave, (0, extractor.n_samples - len(wave))) for wave in waves])
    found = features_of(extractor, tmp_path, padded)
    assert found.shape == wanted.shape == (2, extractor.feature_size, extractor.nb_max_frames)
    assert np.abs(found - wanted).max() <= 1e-4


def test_speech2text(tmp_path: Path) -> None:
    wave = recording(2)[:-2000]  # transformers divides by zero where a band never changes
    extractor = Speech2TextFeatureExtractor()
    wanted = extractor(wave, sampling_rate=16_000, return_tensors="np").input_features
    found = features_of(extractor, tmp_path, wave[None])
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-3  # deviations of a band are divided by


def test_raw_waveforms_need_no_graph(tmp_path: Path) -> None:
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    info, graph = frontend(tmp_path)
    assert (info.sampling_rate, info.window, info.hop, graph) == (16_000, None, None, None)


def test_normalised_waveforms(tmp_path: Path) -> None:
    extractor, wave = Wav2Vec2FeatureExtractor(do_normalize=True), recording(1)
    wanted = extractor(wave, sampling_rate=16_000, return_tensors="np").input_values
    assert np.abs(features_of(extractor, tmp_path, wave[None]) - wanted).max() <= 1e-4


def test_standard_operators_only(tmp_path: Path) -> None:
    WhisperFeatureExtractor().save_pretrained(tmp_path)
    _, graph = frontend(tmp_path)
    assert {node.domain for node in graph.graph} == {""}


def test_what_cannot_be_a_front_end(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no usable preprocessor_config\.json"):
        frontend(tmp_path)
    WhisperFeatureExtractor(dither=0.1).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="dither"):
        frontend(tmp_path)

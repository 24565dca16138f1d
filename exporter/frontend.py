"""The audio front-end: a graph from raw samples to what the encoder reads, made from `preprocessor_config.json`.

Whatever happens to a frame before its power spectrum is linear: removing its mean, pre-emphasis, window, Fourier transform.
All of it is one matrix, and framing is its stride, so one Conv computes the spectrum. Standard operators only.

- Whisper: frames around each hop (reflected ends), Slaney mels, log10, at most 8 below the loudest, scaled.
- Speech2Text: Kaldi's frames inside the samples, mean removed, pre-emphasis, Povey window, natural log, then mean and
  deviation of each band over time.
- Raw waveforms (Moonshine): no graph, or one that normalises where the configuration asks for it.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.runtime.bundle import AudioInfo, Manifest
from headstart.runtime.contract import AUDIO, INPUT_FEATURES
from headstart.runtime.errors import CheckpointError

from .graph import graph_info, save_graph
from .graph_builder import GraphBuilder

Matrix = NDArray[np.float64]
PREPROCESSOR = "preprocessor_config.json"
PREPROCESSORS = (PREPROCESSOR, "processor_config.json")  # newer checkpoints keep it inside the latter
FRONTEND = "graphs/frontend.onnx"
KALDI_EMPHASIS = 0.97
KALDI_SCALE = 2.0**15  # Kaldi takes samples for 16-bit integers
KALDI_FLOOR = 1.1920929e-07  # float32's epsilon
WHISPER_FLOOR = 1e-10


@dataclass(frozen=True)
class Spectrum:
    """A power spectrum in mel bands.

    Attributes:
        kernel: [2 × bins, frame] samples of a frame to the real parts of its spectrum, then the imaginary ones.
        hop: samples between frames.
        mels: [bands, bins].
    """

    kernel: Matrix
    hop: int
    mels: Matrix


def add_frontend(checkpoint: Path, bundle: Path, manifest: Manifest) -> Manifest:
    """Write the front-end of a checkpoint that has a `preprocessor_config.json`; without one there is none.

    Raises CheckpointError for a feature extractor that is not supported.
    """
    if not any((checkpoint / name).is_file() for name in PREPROCESSORS):
        return manifest
    info, graph = frontend(checkpoint)
    if graph is not None:
        save_graph(graph, bundle / FRONTEND)
        manifest = dataclasses.replace(manifest, graphs={**manifest.graphs, "frontend": graph_info(graph, FRONTEND)})
    return dataclasses.replace(manifest, audio=info)


def frontend(folder: Path) -> tuple[AudioInfo, Any]:
    """(how to feed recordings, the graph [B, samples] -> features, or None where the encoder reads the samples themselves).

    Raises CheckpointError when the checkpoint's feature extractor is missing or of an unknown kind.
    """
    extractor = _extractor(folder)
    kind = type(extractor).__name__
    if getattr(extractor, "dither", 0.0):
        raise CheckpointError(f"{folder / PREPROCESSOR}: dither adds noise at random. Fix: set it to 0.")
    if kind == "WhisperFeatureExtractor":
        info = AudioInfo(extractor.sampling_rate, extractor.n_samples, extractor.hop_length)
        return info, whisper_graph(extractor)
    if kind == "Speech2TextFeatureExtractor":
        return AudioInfo(extractor.sampling_rate, None, 160), kaldi_graph(extractor)
    if kind == "Wav2Vec2FeatureExtractor":
        return AudioInfo(extractor.sampling_rate), normalised_graph() if extractor.do_normalize else None
    raise CheckpointError(
        f"{folder / PREPROCESSOR}: {kind} is not supported. Supported: Whisper, Speech2Text, and raw waveforms (Moonshine)."
    )


def _extractor(folder: Path) -> Any:
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(folder)
    except Exception as error:  # a missing file, no JSON, an unknown kind: each raises its own
        raise CheckpointError(f"{folder} has no usable {PREPROCESSOR}, which audio needs ({error}).") from error


def whisper_graph(extractor: Any) -> Any:
    """As WhisperFeatureExtractor: [B, samples] to [B, bands, samples // hop]."""
    size = extractor.n_fft
    kernel = fourier(size, size) * np.hanning(size + 1)[:-1]  # the periodic window
    build, samples = _start("samples")
    padded = build.node("Pad", [samples, build.ints("ends", [0, size // 2, 0, size // 2])], mode="reflect")
    powers = _mel_powers(build, padded, Spectrum(kernel, extractor.hop_length, extractor.mel_filters.T))
    # The frame around the last sample is dropped.
    bounds = [build.ints("first", [0]), build.ints("last", [-1]), build.ints("time", [2])]
    powers = build.node("Slice", [powers, *bounds])
    logs = _scaled(build, build.node("Log", [_at_least(build, powers, WHISPER_FLOOR)]), "log10", 1 / np.log(10))
    loudest = build.node("ReduceMax", [logs, build.ints("all", [1, 2])], keepdims=1)
    least = build.node("Sub", [loudest, build.constant("range", np.float32(8))])
    raised = build.node("Add", [build.node("Max", [logs, least]), build.constant("offset", np.float32(4))])
    shape = ["batch", extractor.feature_size, f"samples//{extractor.hop_length}"]
    return _finish(build, samples, _scaled(build, raised, "quarter", 0.25), shape)


def kaldi_graph(extractor: Any) -> Any:
    """As Speech2TextFeatureExtractor: [B, samples] to [B, frames, bands]."""
    frame, size = extractor.sampling_rate // 40, 512
    kernel = fourier(size, frame) * povey(frame) @ _emphasis(frame) @ _without_mean(frame) * KALDI_SCALE
    build, samples = _start("samples")
    spectrum = Spectrum(kernel, extractor.sampling_rate // 100, kaldi_mels(extractor.num_mel_bins, extractor.sampling_rate))
    powers = _mel_powers(build, samples, spectrum)
    features = build.node("Log", [_at_least(build, powers, KALDI_FLOOR)])
    if extractor.do_ceptral_normalize:
        features = _normalised(build, features, extractor.normalize_means, extractor.normalize_vars)
    frames = f"(samples - {frame})//{spectrum.hop} + 1"
    transposed = build.node("Transpose", [features], perm=[0, 2, 1])
    return _finish(build, samples, transposed, ["batch", frames, extractor.num_mel_bins])


def normalised_graph() -> Any:
    """As Wav2Vec2FeatureExtractor with `do_normalize`: [B, samples] with mean 0 and deviation 1."""
    build, samples = _start("samples")
    time = build.ints("time", [1])
    centred = build.node("Sub", [samples, build.node("ReduceMean", [samples, time], keepdims=1)])
    variance = build.node("ReduceMean", [build.node("Mul", [centred, centred]), time], keepdims=1)
    deviation = build.node("Sqrt", [build.node("Add", [variance, build.constant("epsilon", np.float32(1e-7))])])
    return _finish(build, samples, build.node("Div", [centred, deviation]), ["batch", "samples"])


def fourier(size: int, frame: int) -> Matrix:
    """[2 × (size // 2 + 1), frame]: the discrete Fourier transform of a frame with zeros behind it."""
    angles = 2 * np.pi * np.outer(np.arange(size // 2 + 1), np.arange(frame)) / size
    return np.concatenate([np.cos(angles), -np.sin(angles)])


def povey(size: int) -> Matrix:
    """Kaldi's window."""
    return np.hanning(size) ** 0.85


def _emphasis(size: int) -> Matrix:
    """x[i] - 0.97 x[i - 1], and x[0] for x[-1]."""
    matrix = np.eye(size) - KALDI_EMPHASIS * np.eye(size, k=-1)
    matrix[0, 0] = 1 - KALDI_EMPHASIS
    return matrix


def _without_mean(size: int) -> Matrix:
    return np.eye(size) - 1 / size


def kaldi_mels(bands: int, sampling_rate: int) -> Matrix:
    """[bands, 257] triangles in Kaldi's mel scale, from 20 Hz."""
    from transformers.audio_utils import mel_filter_bank

    highest = sampling_rate // 2
    filters = mel_filter_bank(257, bands, 20, highest, sampling_rate, None, "kaldi", triangularize_in_mel_space=True)
    mels: Matrix = np.asarray(filters, np.float64).T
    return mels


def _start(axis: str) -> tuple[GraphBuilder, Any]:
    samples = ir.Value(name=AUDIO, shape=ir.Shape(["batch", axis]), type=ir.TensorType(ir.DataType.FLOAT))
    return GraphBuilder(), samples


def _mel_powers(build: GraphBuilder, samples: Any, spectrum: Spectrum) -> Any:
    """[B, samples] to [B, bands, frames]."""
    bins = len(spectrum.kernel) // 2
    kernel = build.constant("spectrum", spectrum.kernel[:, None].astype(np.float32))
    channel = build.node("Unsqueeze", [samples, build.ints("channel", [1])])
    parts = build.node("Conv", [channel, kernel], strides=[spectrum.hop])
    real, imaginary = build.nodes("Split", [parts, build.ints("halves", [bins, bins])], 2, axis=1)
    powers = build.node("Add", [build.node("Mul", [real, real]), build.node("Mul", [imaginary, imaginary])])
    return build.node("MatMul", [build.constant("mels", spectrum.mels.astype(np.float32)), powers])


def _normalised(build: GraphBuilder, features: Any, means: bool, deviations: bool) -> Any:
    """[B, bands, frames], each band over time."""
    time = build.ints("time", [2])
    centred = build.node("Sub", [features, build.node("ReduceMean", [features, time], keepdims=1)])
    variance = build.node("ReduceMean", [build.node("Mul", [centred, centred]), time], keepdims=1)
    features = centred if means else features
    return build.node("Div", [features, build.node("Sqrt", [variance])]) if deviations else features


def _at_least(build: GraphBuilder, value: Any, floor: float) -> Any:
    return build.node("Max", [value, build.constant("floor", np.float32(floor))])


def _scaled(build: GraphBuilder, value: Any, name: str, factor: float) -> Any:
    return build.node("Mul", [value, build.constant(name, np.float32(factor))])


def _finish(build: GraphBuilder, samples: Any, features: Any, shape: list[int | str]) -> Any:
    features.name = INPUT_FEATURES
    features.shape, features.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    return build.model([samples], [features], "frontend")

"""Heads of speech models are trained on what the base writes for recordings."""

from pathlib import Path

import pytest
import soundfile
from safetensors.torch import load_file
from speech import RATE, random_whisper, recording, save_speech_checkpoint
from transformers import AutoFeatureExtractor

from headstart.calibration.distill import DistillOptions
from headstart.calibration.recordings import AudioInputs
from headstart.calibration.train import TrainOptions, train_heads
from headstart.runtime.errors import AudioError, OptionError

SMALL = DistillOptions(new_tokens=12, sequences=3, batch=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    save_speech_checkpoint(folder)
    return folder


@pytest.fixture
def files(checkpoint: Path, tmp_path: Path) -> list[Path]:
    """The first is longer than a window."""
    lengths = (1.5 * AutoFeatureExtractor.from_pretrained(checkpoint).n_samples / RATE, 1.0)
    paths = [tmp_path / f"{i}.wav" for i in range(len(lengths))]
    for i, path in enumerate(paths):
        soundfile.write(path, recording(round(lengths[i], 1), seed=i), RATE)
    return paths


def test_every_window_is_a_source(checkpoint: Path, files: list[Path]) -> None:
    """Three windows in two batches, and what the decoder starts from: language, task and no timestamps."""
    model = random_whisper()
    inputs = AudioInputs(model, AutoFeatureExtractor.from_pretrained(checkpoint), files, SMALL, seed=0)
    assert [len(batch["input_features"]) for batch in inputs] == [2, 1]
    assert len(inputs[0:1]) == 1
    settings = model.generation_config
    prompt = [settings.decoder_start_token_id, settings.task_to_id["transcribe"], settings.no_timestamps_token_id]
    for start, language, *rest in inputs[0]["decoder_input_ids"].tolist():
        assert [start, *rest] == prompt
        assert language in settings.lang_to_id.values()
    assert inputs[1]["decoder_input_ids"][0, 2:].tolist() == prompt[1:2]  # every second batch is written with times


def test_from_recordings_to_heads(checkpoint: Path, files: list[Path], tmp_path: Path) -> None:
    options = TrainOptions(heads=2, own_projection=False, epochs=1, held_out=0.4, distill=SMALL)
    report = train_heads(checkpoint, files, tmp_path / "heads", options)
    assert report["training_tokens"] > report["held_out_tokens"] > 4  # more than the prompt
    tensors = load_file(tmp_path / "heads" / "medusa_lm_head.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items() if "weight" in name} == {
        f"{i}.0.linear.weight": (64, 64) for i in range(2)
    }


def test_what_is_no_recording(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("not a sound")
    with pytest.raises(AudioError, match=r"text\.txt"):
        train_heads(checkpoint, [tmp_path / "text.txt"], tmp_path / "heads")
    with pytest.raises(OptionError, match="No recordings were given"):
        train_heads(checkpoint, [], tmp_path / "heads")
    assert not (tmp_path / "heads").exists()

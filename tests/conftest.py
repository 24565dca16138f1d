"""Fixtures shared by all folders: tiny checkpoints, and bundles exported from them once per run."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from architectures import save_checkpoint, tiny_model
from speech import save_speech_checkpoint

from headstart.exporter.export import export
from headstart.runtime.bundle import Bundle


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """architecture -> checkpoint folder."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            save_checkpoint(tiny_model(name), folder / name)
        return folder / name

    return make


@pytest.fixture(scope="session")
def bundle_of(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """architecture -> its bundle."""
    folder = tmp_path_factory.mktemp("bundles")

    def make(name: str) -> Bundle:
        if not (folder / name).exists():
            export(checkpoint_of(name), folder / name)
        return Bundle.load(folder / name)

    return make


@pytest.fixture(scope="session")
def speech_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny Whisper's bundle, with a front-end."""
    folder = tmp_path_factory.mktemp("speech")
    save_speech_checkpoint(folder / "checkpoint")
    return export(folder / "checkpoint", folder / "bundle")

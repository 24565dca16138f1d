"""Fixtures shared by all folders: tiny checkpoints, and bundles exported from them once per run."""

import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Each process of a parallel run gets cores of its own before torch and ONNX Runtime count them: pools that spin on each
    # other's cores make everything slower.
    _worker, _workers = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    _cores = sorted(os.sched_getaffinity(0))[_worker::_workers]
    os.sched_setaffinity(0, _cores or os.sched_getaffinity(0))

from architectures import save_checkpoint, tiny_model
from speech import save_speech_checkpoint

from headstart.exporter.export import export
from headstart.runtime.bundle import Bundle

LONGEST = ("test_readme.py", "test_realistic_shapes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: begun last, they would keep one of two processes waiting for minutes."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """(name, how to make it) -> a folder that all processes of a run share; whoever needs it first makes it."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"

    def make(name: str, write: Callable[[Path], object]) -> Path:
        folder = shared / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                write(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def checkpoint_of(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], Path]:
    """architecture -> checkpoint folder."""
    return lambda name: made_once(f"checkpoints/{name}", lambda folder: save_checkpoint(tiny_model(name), folder))


@pytest.fixture(scope="session")
def bundle_of(
    checkpoint_of: Callable[[str], Path], made_once: Callable[[str, Callable[[Path], object]], Path]
) -> Callable[[str], Bundle]:
    """architecture -> its bundle."""
    return lambda name: Bundle.load(made_once(f"bundles/{name}", lambda folder: export(checkpoint_of(name), folder)))


@pytest.fixture(scope="session")
def pycode(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Bundle:
    """The shipped sample's bundle, with its Medusa heads: head size 32, vocabulary 4,096, tied."""
    checkpoint = Path(__file__).parent.parent / "samples/checkpoints/pycode"
    return Bundle.load(made_once("samples/pycode", lambda folder: export(checkpoint, folder, [checkpoint / "medusa"])))


@pytest.fixture(scope="session")
def speech_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny Whisper's bundle, with a front-end."""
    folder = tmp_path_factory.mktemp("speech")
    save_speech_checkpoint(folder / "checkpoint")
    return export(folder / "checkpoint", folder / "bundle")

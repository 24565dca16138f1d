"""Which files of a folder a model is trained on."""

from collections.abc import Sequence
from pathlib import Path

SOUND_FILES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au")  # what libsndfile reads by name


def training_files(paths: Sequence[Path], sound: bool) -> list[Path]:
    """Files as given. A folder stands for the sound files below it where `sound` is what the model reads, else for its text.

    Text is told as git does it: no NUL among the first bytes.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(file for file in path.rglob("*") if file.is_file())
            files += [file for file in below if (file.suffix.lower() in SOUND_FILES if sound else _is_text(file))]
        else:
            files.append(path)
    return files


def _is_text(file: Path) -> bool:
    with file.open("rb") as stream:
        return b"\0" not in stream.read(8000)

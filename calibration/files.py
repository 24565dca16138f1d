"""Choosing the files of a folder that a model is trained on."""

from collections.abc import Sequence
from pathlib import Path

SOUND_FILES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au")  # by name, what libsndfile reads


def training_files(paths: Sequence[Path], sound: bool) -> list[Path]:
    """Files as given; of a folder, the sound files below it if the model reads `sound`, else its text files.

    Text is recognised as in git: no NUL among the first bytes.
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

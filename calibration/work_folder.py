"""Finished pieces of a long run, each in its own file: the same run, started again, goes on from them.

A piece is named after what it is made from, so that nothing of other settings is ever taken for it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.runtime.errors import OutputError

Tensors = dict[str, Tensor]
Keep = Callable[[str, Callable[[], Tensors]], Tensors]  # a piece's name and what makes it, to the piece


def made_anew(name: str, make: Callable[[], Tensors]) -> Tensors:
    """A `Keep` that keeps nothing."""
    return make()


class WorkFolder:
    """The pieces of one run in `folder`, which is made with its first piece.

    `settings` is everything that the pieces depend on: JSON values, and hashes of files.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self._folder, self._key = folder, digest[:16]

    def with_settings(self, settings: Mapping[str, Any]) -> "WorkFolder":
        """For pieces that depend on more."""
        return WorkFolder(self._folder, {"earlier": self._key, **settings})

    def keep(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """The piece of that name, made if it is not there."""
        found = self.load(name)
        if found is None:
            found = make()
            self.save(name, found)
        return found

    def load(self, name: str) -> Any | None:
        """None where there is no such piece, or none that can be read: it is made again."""
        with suppress(Exception):  # torch raises many kinds for a damaged file
            return torch.load(self._file(name), weights_only=True)
        return None

    def save(self, name: str, piece: Any) -> None:
        """Tensors and numbers, by rename: a file with that name is whole. Raises OutputError when it cannot be written."""
        file = self._file(name)
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.save(piece, partial)
            partial.replace(file)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            partial.unlink(missing_ok=True)
            raise OutputError(
                f"{self._folder} cannot be written ({error}). Fix: --work with a folder you can write to."
            ) from error

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.{self._key}.pt"

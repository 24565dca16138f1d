"""A folder that holds a draft head: its configuration, the names of its tensors, and their values when asked for."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.errors import HeadError

Tensors = Mapping[str, NDArray[np.float32]]
NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|rng_state|scaler).*"
)  # pickles that trainers save next to weights


@dataclass(frozen=True)
class HeadFolder:
    """`files`: tensor name -> weight file in `path`; `config`: config.json, empty where there is none."""

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> "HeadFolder":
        """Raises HeadError when there is no such folder, or a file in it cannot be read."""
        if not path.is_dir():
            raise HeadError(f"{path} is not a folder. A draft head is a folder with its weights and config.json.")
        return cls(path, _config(path), tensor_names(path))

    def tensors(self, pattern: str) -> Tensors:
        """The tensors whose whole name matches `pattern`, as float32.

        Raises HeadError when a file is missing or damaged, or a tensor holds NaN or infinity.
        """
        wanted = [name for name in self.files if re.fullmatch(pattern, name)]
        tensors = read_tensors(self.path, self.files, wanted)
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise HeadError(
                    f"{self.path / self.files[name]}: {name} holds NaN or infinite weights ({(~np.isfinite(tensor)).sum()} of "
                    f"{tensor.size}). Fix: download or train the head again."
                )
        return tensors


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return _json(file) if file.is_file() else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise HeadError(f"{file} is not valid JSON ({error}). Fix: download it again.") from error
    return document if isinstance(document, dict) else {}


def tensor_names(folder: Path) -> dict[str, str]:
    """Tensor name -> file, over every weight file of the folder.

    Indices of sharded checkpoints come first, so that a missing shard is noticed; then pickles; then safetensors, which take
    precedence over pickles of the same tensors.
    """
    names: dict[str, str] = {}
    for file in sorted(folder.glob("*.index.json")):
        names.update(_json(file).get("weight_map", {}))
    for file in sorted([*folder.glob("*.pt"), *folder.glob("*.bin")]):
        if not NOT_WEIGHTS.fullmatch(file.name):
            names.update(dict.fromkeys(_load_pickle(file), file.name))
    for file in sorted(folder.glob("*.safetensors")):
        names.update(dict.fromkeys(_safetensors_names(file), file.name))
    return names


def read_tensors(folder: Path, names: Mapping[str, str], wanted: list[str]) -> Tensors:
    """The wanted tensors as float32, each file opened once."""
    tensors: dict[str, NDArray[np.float32]] = {}
    for file in sorted({names[name] for name in wanted}):
        here = [name for name in wanted if names[name] == file]
        if not (folder / file).is_file():
            raise HeadError(f"{folder / file} is missing: the index says that it holds {here[0]}. Fix: download it too.")
        tensors.update(_read_file(folder / file, here))
    return tensors


def _read_file(file: Path, wanted: list[str]) -> Tensors:
    if file.suffix != ".safetensors":
        pickled = _load_pickle(file)
        return {name: pickled[name].float().numpy() for name in wanted}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:  # torch's reader knows bfloat16, numpy's does not
            return {name: tensors.get_tensor(name).float().numpy() for name in wanted}
    except (SafetensorError, OSError) as error:
        raise HeadError(f"{file} cannot be read ({error}). Fix: download or copy it again.") from error


def _safetensors_names(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise HeadError(f"{file} cannot be read ({error}). Fix: download or copy it again.") from error


def _load_pickle(file: Path) -> dict[str, Any]:
    import torch

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)  # never run what a pickle says
    except Exception as error:  # torch raises many kinds for a damaged file
        raise HeadError(
            f"{file} cannot be read as weights ({type(error).__name__}). Fix: download or copy it again."
        ) from error
    if not isinstance(loaded, dict):
        raise HeadError(f"{file} cannot be read as weights: it holds a {type(loaded).__name__}, not tensors by name.")
    return {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}

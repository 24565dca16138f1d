"""Which family and dialect of draft head a folder holds.

Decided by tensor names first and by the configuration second: published configurations state wrong counts.
"""

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

# What each Medusa dialect calls its tensors: a head's residual block, and its projection onto the vocabulary.
# Groups: head, then block where there are blocks, then weight or bias.
DIALECTS = {
    "medusa-1": (r"(\d+)\.(\d+)\.linear\.(weight|bias)", r"(\d+)\.(\d+)\.(weight)"),
    "medusa-2": (r"medusa_head\.(\d+)\.(\d+)\.linear\.(weight|bias)", r"medusa_head\.(\d+)\.(\d+)\.(weight)"),
    "modelopt": (r"medusa_heads\.(\d+)\.(\d+)\.linear\.(weight|bias)", r"medusa_heads\.(\d+)\.(\d+)\.(weight)"),
    "vllm": (
        r"(?:medusa_heads\.)?blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)",
        r"(?:medusa_heads\.)?lm_heads\.(\d+)()\.(weight)",
    ),
}

# Other families, by a tensor name or a configuration key that only they have; the first match names the family.
OTHER_TENSORS = {
    r"midlayer\.": "EAGLE-3",
    r"layers\.0\.mlp_moe\.": "Jakiro",
    r"medusa_block\.": "Whisper-Medusa (block)",
    r"hydra_lm_head\.|hydra_mlp\.": "Hydra",
    r"rnn_u\.": "ReDrafter",
    r"speculator\.(emb|proj|head)\.": "MLP speculator",
    r"markov_head\.": "DSpark",
    r"prefix_gru\.": "Domino",
    r"(mtp\.|.*eh_proj|model\.mtp_layers\.)": "MTP",
    r"(pre_projection|masked_embedding)": "Gemma assistant",
    r"prompt_embeddings": "PPD prompt tokens",
    r"fc\.weight": "EAGLE or DFlash",
}
OTHER_KEYS = {
    "speculators_model_type": "vLLM speculators",
    "medusa_heads_type": "Whisper-Medusa",
    "hydra_num_heads": "Hydra",
    "dflash_config": "DFlash",
}


@dataclass(frozen=True)
class HeadCheckpoint:
    """A recognised folder: its dialect, its head tensors as float32, its configuration."""

    path: Path
    dialect: str
    tensors: Tensors
    config: dict[str, Any]


def recognise(folder: Path) -> HeadCheckpoint:
    """Read a Medusa checkpoint of any known dialect.

    Raises HeadError when the folder holds another family, nothing known, or a file that cannot be read.
    """
    if not folder.is_dir():
        raise HeadError(f"{folder} is not a folder. A draft head is a folder with its weights and config.json.")
    config = _config(folder)
    names = tensor_names(folder)
    for dialect, patterns in DIALECTS.items():
        block, projection = (re.compile(pattern) for pattern in patterns)
        wanted = [name for name in names if block.fullmatch(name) or projection.fullmatch(name)]
        if any(block.fullmatch(name) for name in wanted):
            return HeadCheckpoint(folder, dialect, read_tensors(folder, names, wanted), config)
    raise HeadError(f"{folder}: {_other_family(names, config)}")


def _other_family(names: Mapping[str, str], config: dict[str, Any]) -> str:
    found = [family for key, family in OTHER_KEYS.items() if key in config]
    found += [family for pattern, family in OTHER_TENSORS.items() if any(re.match(pattern, name) for name in names)]
    if config.get("model_type") == "mlp_speculator":
        found.append("MLP speculator")
    if found:
        return f"this is a {found[0]} head, and this version imports Medusa heads only ({', '.join(DIALECTS)})."
    shown = ", ".join(list(names)[:3])
    return (
        "no draft head was recognised. Looked for Medusa tensors such as 0.0.linear.weight, medusa_head.0.0.linear.weight, "
        f"medusa_heads.0.0.linear.weight and blocks.0.layers.0.weight; found {shown or 'no weights at all'}."
    )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise HeadError(f"{file} is no valid JSON ({error}). Fix: download it again.") from error
    return document if isinstance(document, dict) else {}


def tensor_names(folder: Path) -> dict[str, str]:
    """Tensor name -> file, over every weight file of the folder; safetensors win over pickles of the same tensors."""
    names: dict[str, str] = {}
    for file in sorted([*folder.glob("*.pt"), *folder.glob("*.bin")]):
        names.update(dict.fromkeys(_load_pickle(file), file.name))
    for file in sorted(folder.glob("*.safetensors")):
        names.update(dict.fromkeys(_safetensors_names(file), file.name))
    return names


def read_tensors(folder: Path, names: Mapping[str, str], wanted: list[str]) -> Tensors:
    """The wanted tensors as float32, each file opened once."""
    tensors: dict[str, NDArray[np.float32]] = {}
    for file in sorted({names[name] for name in wanted}):
        here = [name for name in wanted if names[name] == file]
        tensors.update(_read_file(folder / file, here))
    return tensors


def _read_file(file: Path, wanted: list[str]) -> Tensors:
    if file.suffix != ".safetensors":
        pickled = _load_pickle(file)
        return {name: pickled[name].float().numpy() for name in wanted}
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:  # torch's reader knows bfloat16, numpy's does not
        return {name: tensors.get_tensor(name).float().numpy() for name in wanted}


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
    return {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}

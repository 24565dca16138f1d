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


NOTHING = r"(?!)"  # an expression that no name matches


@dataclass(frozen=True)
class Dialect:
    """How a published format names the tensors of Medusa heads, as regular expressions of the whole name.

    Attributes:
        block: of a residual block; groups: head, block, weight or bias.
        projection: of a head onto the vocabulary; groups: head, place after the head's blocks (may be empty).
        extra: of tensors that belong to all heads; one group, the name without prefix.
        output: of the second matrix of a block that has two; groups as of the first.
        first_head: the number of the head that proposes the second token ahead; those before it propose nothing.
    """

    block: str
    projection: str
    extra: str = NOTHING
    output: str = NOTHING
    first_head: int = 0


DIALECTS = {
    "medusa-1": Dialect(r"(\d+)\.(\d+)\.linear\.(weight|bias)", r"(\d+)\.(\d+)\.weight"),
    "medusa-2": Dialect(r"medusa_head\.(\d+)\.(\d+)\.linear\.(weight|bias)", r"medusa_head\.(\d+)\.(\d+)\.weight"),
    "modelopt": Dialect(r"medusa_heads\.(\d+)\.(\d+)\.linear\.(weight|bias)", r"medusa_heads\.(\d+)\.(\d+)\.weight"),
    "vllm": Dialect(  # vllm/model_executor/models/medusa.py, load_weights
        r"(?:medusa_heads\.)?blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)",
        r"(?:medusa_heads\.)?lm_heads\.(\d+)()\.weight",
        r"(?:medusa_heads\.)?(token_map|lm_head\.weight)",
    ),
    "blockwise": Dialect(  # calibration/train.py
        r"blockwise_heads\.(\d+)\.(\d+)\.wi\.(weight|bias)",
        r"blockwise_heads\.(\d+)\.(\d+)\.weight",
        output=r"blockwise_heads\.(\d+)\.(\d+)\.wo\.(weight|bias)",
    ),
    # Names as ModelOpt's, with the fine-tuned Whisper beside them, whose LM head projects; head 0 stands in for it.
    "whisper-medusa": Dialect(r"medusa_heads\.(\d+)\.(\d+)\.linear\.(weight|bias)", NOTHING, first_head=1),
}
LOSSY = ("whisper-medusa",)  # dialects whose published model does not say what its base says

# Other families by what only they have, the first match names the family. Configuration keys are looked at before Medusa's
# names, which some of these families use too.
OTHER_KEYS = {
    "speculators_model_type": "vLLM speculators",
    "speculators_config": "vLLM speculators",
    "hydra_num_heads": "Hydra",
    "dflash_config": "DFlash",
    "target_layer_ids": "DFlash",
}
OTHER_TYPES = {"mlp_speculator": "MLP speculator", "recurrent_drafting_drafter": "ReDrafter"}
WHISPER_MEDUSA = re.compile(r"whisper_model\.|medusa_block\.")
OTHER_TENSORS = {
    r"mask_hidden": "P-EAGLE",
    r"midlayer\.": "EAGLE-3",
    r"layers\.0\.mlp_moe\.": "Jakiro",
    r"hydra_lm_head\.|hydra_mlp\.": "Hydra",
    r"rnn_u\.": "ReDrafter",
    r"speculator\.(emb|proj|head)\.": "MLP speculator",
    r"markov_head\.": "DSpark",
    r"prefix_gru\.": "Domino",
    r"mtp\.|.*eh_proj|model\.mtp_layers\.": "MTP",
    r"pre_projection|masked_embedding": "Gemma assistant",
    r"prompt_embeddings": "PPD prompt tokens",
    r"hidden_norm\.": "DFlash",
    r"embed_layernorm\.": "HASS",
    r"fc\.weight": "EAGLE",
}
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|scaler).*")  # pickles a trainer leaves beside them


@dataclass(frozen=True)
class HeadCheckpoint:
    """A recognised folder: its dialect, its head tensors as float32, its configuration."""

    path: Path
    dialect: str
    tensors: Tensors
    config: dict[str, Any]


def recognise(folder: Path, lossy: bool = False) -> HeadCheckpoint:
    """Read a Medusa checkpoint of any known dialect; the lossy ones only when `lossy`.

    Raises HeadError when the folder holds another family, nothing known, or a file that cannot be read.
    """
    if not folder.is_dir():
        raise HeadError(f"{folder} is not a folder. A draft head is a folder with its weights and config.json.")
    config = _config(folder)
    names = tensor_names(folder)
    dialect = _dialect(folder, config, names)
    if dialect in LOSSY and not lossy:
        raise HeadError(f"{folder}: {_why_lossy(dialect)}")
    patterns = DIALECTS[dialect]
    kinds = (patterns.block, patterns.output, patterns.projection, patterns.extra)
    wanted = [name for name in names if any(re.fullmatch(kind, name) for kind in kinds)]
    return HeadCheckpoint(folder, dialect, read_tensors(folder, names, wanted), config)


def _dialect(folder: Path, config: dict[str, Any], names: Mapping[str, str]) -> str:
    if "medusa_heads_type" in config or any(WHISPER_MEDUSA.match(name) for name in names):
        _check_whisper_medusa(folder, config, names)
        return "whisper-medusa"
    other = _named_by_config(config)
    dialect = None if other else _medusa_dialect(names)
    if dialect is None:
        raise HeadError(f"{folder}: {_not_medusa(other or _named_by_tensors(OTHER_TENSORS, names) or _kangaroo(names), names)}")
    return dialect


def _check_whisper_medusa(folder: Path, config: dict[str, Any], names: Mapping[str, str]) -> None:
    """Only the linear variant (`base_head`) is independent heads on the decoder's own state."""
    kind = config.get("medusa_heads_type", "base_head")
    if kind != "base_head" or any(name.startswith("medusa_block.") for name in names):
        raise HeadError(
            f"{folder}: this is a Whisper-Medusa head of the block variant ({kind}): it reads one more decoder layer with "
            "caches of its own, which this version does not draft with. Fix: the linear variant, or headstart heads train."
        )


def _why_lossy(dialect: str) -> str:
    return (
        f"these heads ({dialect}, base_head) are lossy as published: the last decoder layer was fine-tuned with them, and head "
        "0 replaces Whisper's own next token. Fix: headstart heads import --lossy takes the heads after it as drafts; what is "
        "written is then the bundle's target's own choice, which may differ from the published model's."
    )


def _medusa_dialect(names: Mapping[str, str]) -> str | None:
    """The first whose blocks are there; Whisper-Medusa's names are ModelOpt's, which comes before it."""
    return next((d for d, patterns in DIALECTS.items() if any(re.fullmatch(patterns.block, name) for name in names)), None)


def _named_by_config(config: dict[str, Any]) -> str | None:
    by_key = next((family for key, family in OTHER_KEYS.items() if key in config), None)
    return by_key or OTHER_TYPES.get(str(config.get("model_type")))


def _named_by_tensors(families: Mapping[str, str], names: Mapping[str, str]) -> str | None:
    return next((family for pattern, family in families.items() if any(re.match(pattern, name) for name in names)), None)


def _kangaroo(names: Mapping[str, str]) -> str | None:
    """Its adapter is a decoder layer without its MLP, and nothing else has that."""
    is_adapter = any(name.startswith("layers.0.self_attn.") for name in names) and not any(".mlp." in name for name in names)
    return "Kangaroo" if is_adapter else None


def _not_medusa(family: str | None, names: Mapping[str, str]) -> str:
    if family:
        return (
            f"this is a {family} head, and this version imports Medusa heads only ({', '.join(DIALECTS)}). "
            "Fix: Medusa heads for the same target; headstart heads train makes them."
        )
    shown = ", ".join(list(names)[:3])
    return (
        "no draft head was recognised. Looked for Medusa tensors such as 0.0.linear.weight, medusa_head.0.0.linear.weight, "
        "medusa_heads.0.0.linear.weight and blocks.0.layers.0.weight, and for the names of other families; "
        f"found {shown or 'no weights at all'}. Fix: the folder that holds the head's own weight file."
    )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return _json(file) if file.is_file() else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise HeadError(f"{file} is no valid JSON ({error}). Fix: download it again.") from error
    return document if isinstance(document, dict) else {}


def tensor_names(folder: Path) -> dict[str, str]:
    """Tensor name -> file, over every weight file of the folder.

    Indices of sharded checkpoints come first, so that a shard which is not there is missed; then pickles; then
    safetensors, which win over pickles of the same tensors.
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

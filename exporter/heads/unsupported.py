"""Published families that this version cannot import, by what only they have: to refuse them by name."""

import re
from collections.abc import Mapping
from typing import Any

from .folder import HeadFolder

# The first match names the family. Some of these use Medusa's tensor names, so their configuration keys come first.
OTHER_KEYS = {
    "speculators_model_type": "vLLM speculators",
    "speculators_config": "vLLM speculators",
    "dflash_config": "DFlash",
    "target_layer_ids": "DFlash",
}
OTHER_TENSORS = {
    r"mask_hidden": "P-EAGLE",
    r"midlayer\.": "EAGLE-3",
    r"layers\.0\.mlp_moe\.": "Jakiro",
    r"markov_head\.": "DSpark",
    r"prefix_gru\.": "Domino",
    r"mtp\.|.*eh_proj|model\.mtp_layers\.": "MTP",
    r"pre_projection|masked_embedding": "Gemma assistant",
    r"prompt_embeddings": "PPD prompt tokens",
    r"hidden_norm\.": "DFlash",
    r"embed_layernorm\.": "HASS",
    r"fc\.weight": "EAGLE",
}


def named_by_config(config: Mapping[str, Any]) -> str | None:
    """The family whose own keys the configuration has."""
    return next((family for key, family in OTHER_KEYS.items() if key in config), None)


def unsupported_family(folder: HeadFolder) -> str | None:
    """The family's name; None when nothing is recognised."""
    return named_by_config(folder.config) or _named_by_tensors(folder.files) or _kangaroo(folder.files)


def _named_by_tensors(names: Mapping[str, str]) -> str | None:
    return next((family for pattern, family in OTHER_TENSORS.items() if any(re.match(pattern, name) for name in names)), None)


def _kangaroo(names: Mapping[str, str]) -> str | None:
    """Its adapter is a decoder layer without its MLP, and nothing else has that."""
    is_adapter = any(name.startswith("layers.0.self_attn.") for name in names) and not any(".mlp." in name for name in names)
    return "Kangaroo" if is_adapter else None

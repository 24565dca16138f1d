"""Tiny random models of every supported architecture, built from configurations in code."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GATED = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
WINDOWED = {**GATED, "sliding_window": 8}
MIXED = ["sliding_attention", "full_attention"]

# name -> (class prefix, configuration)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GATED),
    "llama_tied": ("Llama", {**GATED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", GATED),
    "qwen3": ("Qwen3", {**GATED, "head_dim": 24}),
    "mistral": ("Mistral", WINDOWED),
    "gemma2": (
        "Gemma2",
        {**WINDOWED, "head_dim": 16, "layer_types": MIXED, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3", {**WINDOWED, "head_dim": 16, "layer_types": MIXED}),
    "phi3": ("Phi3", WINDOWED),
    "gpt2": (
        "GPT2",
        {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": ("GPTNeoX", {**COMMON, "intermediate_size": 128}),
    "opt": ("OPT", {**COMMON, "ffn_dim": 128, "word_embed_proj_dim": 48}),
    "stablelm": ("StableLm", GATED),
    "smollm3": ("SmolLM3", {**GATED, "no_rope_layers": [1, 0]}),
    "olmo2": ("Olmo2", GATED),
    "cohere": ("Cohere", {**GATED, "logit_scale": 0.25}),
    "granite": ("Granite", {**GATED, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
}


def tiny_model(name: str, seed: int = 0) -> Any:
    """A random model whose logits are spread enough that greedy decoding has no near-ties."""
    prefix, settings = ARCHITECTURES[name]
    config_name = f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    config = getattr(transformers, config_name)(**settings)
    torch.manual_seed(seed)
    class_name = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


def byte_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """One token per byte behind three special ones; the rest of the vocabulary has names of its own."""
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*specials, *alphabet]
    pieces += [f"<extra_{i}>" for i in range(vocab_size - len(pieces))]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_checkpoint(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer(model.config.get_text_config().vocab_size).save_pretrained(folder)
    return folder

"""Random models of every architecture in one or two layers, with the shapes of published checkpoints.

Hidden size 640, head sizes 52 to 256, grouped heads, a vocabulary of 5,000, weights tied where the family ties them, and
windows shorter than the prompts of the tests. The tiny models of `architectures` are 64 wide, with heads of 16: what depends
on a size (where a weight is stored, which kernel runs) does not show there.
"""

from typing import Any

import torch
from architectures import ENCODER_DECODERS, GEMMA_SIZES, MIXED, random_model

VOCAB, HIDDEN, WINDOW = 5000, 640, 32
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 1280,
    "num_hidden_layers": 1,
    "max_position_embeddings": 512,
}
HEADS_64 = {**COMMON, "num_attention_heads": 10, "num_key_value_heads": 2}
HEADS_128 = {**COMMON, "num_attention_heads": 5, "num_key_value_heads": 1}
HEADS_256 = {**COMMON, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": MIXED, "sliding_window": WINDOW}

BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 10,
    "decoder_attention_heads": 10,
    "encoder_ffn_dim": 1280,
    "decoder_ffn_dim": 1280,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SPEECH: dict[str, Any] = {key: value for key, value in BART.items() if key != "max_position_embeddings"} | {
    "max_source_positions": 300,
    "max_target_positions": 448,
}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 64,
    "d_ff": 1280,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 10,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
GEMMA = {**GEMMA_SIZES, **HEADS_256, **TWO_LAYERS, "query_pre_attn_scalar": 256}

# architecture -> what its configuration in `architectures` is updated by
REALISTIC: dict[str, dict[str, Any]] = {
    "llama": HEADS_256,
    "llama_tied": HEADS_64,
    "qwen2": {**HEADS_128, "tie_word_embeddings": True},
    "qwen3": {**HEADS_64, "head_dim": 128, "tie_word_embeddings": True},
    "mistral": {**HEADS_128, "sliding_window": WINDOW},
    "gemma2": {
        **HEADS_256,
        **TWO_LAYERS,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {**HEADS_256, **TWO_LAYERS},
    "phi3": {**HEADS_64, "sliding_window": WINDOW},
    "gpt2": {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 1, "n_head": 10, "n_positions": 512},
    "gpt_neox": HEADS_128,
    "opt": {**HEADS_64, "ffn_dim": 1280, "word_embed_proj_dim": 512},
    "stablelm": HEADS_64,
    "smollm3": {**HEADS_128, "num_hidden_layers": 2, "tie_word_embeddings": True},
    "olmo2": HEADS_128,
    "cohere": HEADS_128,
    "granite": {**HEADS_64, "tie_word_embeddings": True},
    "t5": T5,
    "flan_t5": T5,
    "mt5": {**T5, "num_heads": 6},
    "umt5": T5,
    "bart": BART,
    "mbart": BART,
    "marian": {**BART, "encoder_attention_heads": 5, "decoder_attention_heads": 5},
    "pegasus": BART,
    "m2m_100": BART,
    "blenderbot": {**BART, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "t5gemma": {"vocab_size": VOCAB, "encoder": GEMMA, "decoder": GEMMA},
    "t5gemma2": {"decoder": GEMMA, "eoi_token_index": VOCAB - 1, "image_token_index": VOCAB - 2},
    "whisper": {**SPEECH, "num_mel_bins": 80},
    "moonshine": {  # the base's: head size 52, padded to 56
        "vocab_size": VOCAB,
        "hidden_size": 416,
        "intermediate_size": 1664,
        "encoder_num_hidden_layers": 1,
        "decoder_num_hidden_layers": 1,
        "encoder_num_attention_heads": 8,
        "decoder_num_attention_heads": 8,
        "pad_head_dim_to_multiple_of": 8,
        "max_position_embeddings": 512,
    },
    "speech2text": {**SPEECH, "max_source_positions": 1200, "input_feat_per_channel": 80, "conv_channels": 256},
}

DEFAULT_SCALES = (0.002, 3.0)
# Embeddings that are multiplied by the square root of the width, or normalised before the first layer.
SCALES = {"gemma3": (0.0005, 3.0), "t5gemma2": (0.0005, 3.0)} | dict.fromkeys(
    ("bart", "mbart", "marian", "pegasus", "m2m_100", "blenderbot", "speech2text"), (0.01, 8.0)
)


def realistic_model(name: str, seed: int = 0) -> Any:
    """A random model whose greedy output follows its context: no near-ties, and no token repeated for ever."""
    settings = dict(REALISTIC[name])
    if name == "t5gemma2":
        settings["encoder"] = ENCODER_DECODERS[name][2]["encoder"] | {"text_config": GEMMA}
    return diversified(random_model(name, seed, **settings), *SCALES.get(name, DEFAULT_SCALES))


def diversified(model: Any, embeddings: float, gain: float) -> Any:
    """Draws weights so that the output depends on the context: `embeddings` is their deviation, `gain` a layer's output's.

    A tied LM head gives the input token the highest score wherever its embedding dominates the residual stream.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and parameter.requires_grad:
                embedding = any(part in name for part in ("embed", "wte", "wpe", "shared"))
                parameter.normal_(std=embeddings if embedding else gain * parameter.shape[-1] ** -0.5)
    return model

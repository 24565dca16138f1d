"""Tiny random models of every supported architecture, built from configurations in code."""

import copy
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

BERT_SIZES: dict[str, Any] = {**COMMON, "intermediate_size": 96, "is_decoder": True}
DECODER_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
# Causal LMs that number positions themselves: from padding_idx + 1, or from the length of the cache.
SELF_POSITIONED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert_decoder": ("BertLMHead", BERT_SIZES),
    "roberta_decoder": ("Roberta", {**BERT_SIZES, "pad_token_id": 1, "bos_token_id": 0}),
    "xlm_roberta_decoder": ("XLMRoberta", BERT_SIZES),
    "bart_decoder": ("Bart", DECODER_SIZES),
    "pegasus_decoder": ("Pegasus", {**DECODER_SIZES, "encoder_layers": 1}),
    "marian_decoder": ("Marian", DECODER_SIZES),
    "bigbird_pegasus_decoder": ("BigBirdPegasus", DECODER_SIZES),
}
LONG_FACTORS: dict[str, Any] = {
    "rope_theta": 10000.0,
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.7 * i for i in range(8)],
    "original_max_position_embeddings": 32,
}
# Causal LMs whose rotary frequencies change with the length of the text.
LENGTH_DEPENDENT: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3_longrope": ("Phi3", {**GATED, "original_max_position_embeddings": 32, "rope_parameters": LONG_FACTORS}),
    "llama_longrope": ("Llama", {**GATED, "rope_parameters": LONG_FACTORS}),
}

T5_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
# Encoder and decoder of unlike sizes; no forced tokens, so that greedy decoding is plain.
BART_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "scale_embedding": True,
    "tie_word_embeddings": False,
}
GEMMA_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "layer_types": MIXED,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SPEECH_SIZES: dict[str, Any] = {
    key: value for key, value in BART_SIZES.items() if key not in ("max_position_embeddings", "forced_eos_token_id")
} | {"max_source_positions": 60, "max_target_positions": 128}
MOONSHINE_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "encoder_num_hidden_layers": 1,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_head_dim_to_multiple_of": 12,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# name -> (model class, configuration class, configuration)
ENCODER_DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5_SIZES),
    "flan_t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5_SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5_SIZES),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", T5_SIZES),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART_SIZES),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", BART_SIZES),
    "marian": ("MarianMTModel", "MarianConfig", BART_SIZES),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", BART_SIZES),
    "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Config", BART_SIZES),
    "blenderbot": ("BlenderbotForConditionalGeneration", "BlenderbotConfig", BART_SIZES),
    "t5gemma": (
        "T5GemmaForConditionalGeneration",
        "T5GemmaConfig",
        {
            "encoder": {**GEMMA_SIZES, "intermediate_size": 80},
            "decoder": {**GEMMA_SIZES, "num_hidden_layers": 3, "layer_types": [*MIXED, "sliding_attention"]},
            "vocab_size": 300,
        },
    ),
    "t5gemma2": (
        "T5Gemma2ForConditionalGeneration",
        "T5Gemma2Config",
        {
            "encoder": {
                "text_config": GEMMA_SIZES,
                "vision_config": {
                    "hidden_size": 32,
                    "intermediate_size": 32,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 28,
                    "patch_size": 14,
                },
                "mm_tokens_per_image": 4,
            },
            "decoder": GEMMA_SIZES,
            "eoi_token_index": 299,
            "image_token_index": 298,
        },
    ),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {**SPEECH_SIZES, "num_mel_bins": 20}),
    "moonshine": ("MoonshineForConditionalGeneration", "MoonshineConfig", MOONSHINE_SIZES),
    "speech2text": (
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        {
            **SPEECH_SIZES,
            "max_source_positions": 400,
            "input_feat_per_channel": 20,
            "conv_channels": 32,
            "conv_kernel_sizes": (5, 5),
        },
    ),
}


def tiny_model(name: str, seed: int = 0) -> Any:
    """A random model whose logits are spread enough that greedy decoding has no near-ties."""
    if name not in ENCODER_DECODERS:
        return spread(random_model(name, seed))
    class_name = ENCODER_DECODERS[name][0]
    # A model that repeats one token whatever its source proves little: neither embedding nor attention may outweigh the other.
    if class_name.startswith(("T5", "MT5", "UMT5", "Moonshine")):
        return spread(random_model(name, seed), 3.0, 0.4)
    return spread(random_model(name, seed), 4.0, 16.0) if name == "whisper" else spread(random_model(name, seed))


def random_model(name: str, seed: int = 0, **settings: Any) -> Any:
    """The architecture as transformers initialises it, in its configuration above updated by `settings`."""
    torch.manual_seed(seed)
    if name in ENCODER_DECODERS:
        class_name, config_name, defaults = ENCODER_DECODERS[name]
        config = getattr(transformers, config_name)(**copy.deepcopy(defaults | settings))
        return getattr(transformers, class_name)(config).eval()
    prefix, defaults = (ARCHITECTURES | SELF_POSITIONED | LENGTH_DEPENDENT)[name]
    config_name = f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix.removesuffix('LMHead')}Config"
    config = getattr(transformers, config_name)(**defaults | settings)
    class_name = f"{prefix}Model" if prefix == "BertLMHead" else f"{prefix}ForCausalLM"
    class_name = "GPT2LMHeadModel" if prefix == "GPT2" else class_name
    return getattr(transformers, class_name)(config).eval()


def spread(model: Any, matrices: float = 4.0, embeddings: float = 4.0) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.mul_(embeddings if "embed_tokens" in name or "shared" in name else matrices)
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

"""A Whisper in CTranslate2's form, as faster-whisper takes it, to a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import torch
from ctranslate2_file import Variables, read_variables, whisper_state
from tokenizers import AddedToken
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from headstart.runtime.errors import CheckpointError

HEAD_SIZE = 64  # of every published Whisper
TIMESTAMPS = 1501  # of 0.00 to 30.00 s
FIRST_TIMESTAMP_AT_MOST = 50  # a text begins within the first second


def convert(weights: Path, settings: Path, tokenizer_json: Path, folder: Path) -> None:
    """Write the Hugging Face folder.

    Args:
        weights: model.bin.
        settings: CTranslate2's config.json: suppressed tokens, alignment heads.

    Raises CheckpointError when the weights are not a whole Whisper's.
    """
    specification, variables = read_variables(weights)
    if specification != "WhisperSpec":
        raise CheckpointError(f"{weights} holds a {specification}, not a WhisperSpec. Fix: give a Whisper.")
    tokenizer = tokenizer_of(tokenizer_json)
    config = config_of(variables, tokenizer)
    model = WhisperForConditionalGeneration(config)
    try:
        state = {name: torch.from_numpy(array.copy()) for name, array in whisper_state(variables).items()}
        model.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{weights} is not a whole Whisper: {error}. Fix: fetch it again.") from error
    model.generation_config = generation_config(json.loads(settings.read_text("utf-8")), tokenizer, config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)


def config_of(variables: Variables, tokenizer: PreTrainedTokenizerFast) -> WhisperConfig:
    """Sizes as the weights have them."""
    vocab_size, width = variables["decoder/embeddings/weight"].shape
    layers = {
        stack: len({name.split("/")[1] for name in variables if name.startswith(f"{stack}/layer_")} - {"layer_norm"})
        for stack in ("encoder", "decoder")
    }
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return WhisperConfig(
        vocab_size=vocab_size,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=width // HEAD_SIZE,
        decoder_attention_heads=width // HEAD_SIZE,
        encoder_ffn_dim=variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
    )


def tokenizer_of(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer with the timestamps, which CTranslate2's lacks: the ids after the last of its own."""
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=end, eos_token=end, unk_token=end, pad_token=end)
    stamps = [AddedToken(f"<|{i * 0.02:.2f}|>", normalized=False, special=False) for i in range(TIMESTAMPS)]
    tokenizer.add_tokens(stamps)
    return tokenizer


def generation_config(settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast, config: WhisperConfig) -> GenerationConfig:
    """The rules of Whisper's decoding as transformers keeps them; a vocabulary with more than English has languages."""
    ids = tokenizer.convert_tokens_to_ids
    multilingual = config.vocab_size > ENGLISH_ONLY
    rules = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        max_length=config.max_target_positions,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
    )
    rules.is_multilingual = multilingual
    rules.alignment_heads = settings["alignment_heads"]
    rules.no_timestamps_token_id = ids("<|notimestamps|>")
    rules.prev_sot_token_id = ids("<|startofprev|>")
    rules.max_initial_timestamp_index = FIRST_TIMESTAMP_AT_MOST
    if multilingual:
        languages = tokenizer.convert_ids_to_tokens(settings["lang_ids"])
        rules.lang_to_id = dict(zip(languages, settings["lang_ids"], strict=True))
        rules.task_to_id = {task: ids(f"<|{task}|>") for task in ("transcribe", "translate")}
    return rules


ENGLISH_ONLY = 51864  # tokens of the vocabularies that know no other language

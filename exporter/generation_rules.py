"""What a checkpoint's generation_config says: rules that the runtime applies, and a note on each setting that it does not."""

from collections.abc import Sequence
from typing import Any

from headstart.runtime.bundle import GenerationRules
from headstart.runtime.errors import CheckpointError

# Settings that change what transformers generates and that the runtime does not have.
NOT_APPLIED = (
    "sequence_bias",
    "exponential_decay_length_penalty",
    "guidance_scale",
    "encoder_repetition_penalty",
    "typical_p",
    "top_h",
    "epsilon_cutoff",
    "eta_cutoff",
    "penalty_alpha",
    "dola_layers",
    "diversity_penalty",
    "num_beam_groups",
    "constraints",
    "force_words_ids",
    "watermarking_config",
    "token_healing",
    "remove_invalid_values",
    "stop_strings",
    "max_time",
    "num_return_sequences",
)
OFF: tuple[object, ...] = (None, False, 0, 1, 1.0, (), [])  # values of those settings that change nothing
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def notes(model: Any) -> tuple[str, ...]:
    """One sentence for each setting of generation_config that is not applied."""
    settings = model.generation_config
    stated = {name: getattr(settings, name, None) for name in NOT_APPLIED}
    found = [f"generation_config.json: {name} {value!r} is not applied." for name, value in stated.items() if value not in OFF]
    if getattr(settings, "do_sample", False):
        chosen = {name: getattr(settings, name, None) for name in SAMPLING}
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items() if value is not None)
        found.append(
            f"generation_config.json: do_sample is not applied: decoding is greedy. To sample: {options or '--temperature 1'}."
        )
    return tuple(found)


def generation_rules(model: Any, vocab_size: int) -> GenerationRules:
    """What the checkpoint's generation_config (or config) says of end, begin, forced and suppressed tokens, and lengths.

    Tokens that the model does not have are left out: Whisper's configuration suppresses some of its usual vocabulary.
    """
    settings = model.generation_config

    def known(token_ids: Sequence[int]) -> bool:
        return all(0 <= token < vocab_size for token in token_ids)

    def stated(name: str, default: Any = None) -> Any:
        value = getattr(settings, name, None)
        return default if value is None else value

    start = one_token(stated("decoder_start_token_id", settings.bos_token_id))
    forced_ends = _token_ids(stated("forced_eos_token_id"))
    return GenerationRules(
        eos_token_ids=_token_ids(settings.eos_token_id),
        bos_token_id=settings.bos_token_id,
        suppress_tokens=_token_ids(stated("suppress_tokens")),
        pad_token_id=stated("pad_token_id"),
        decoder_start_token_id=start if model.config.is_encoder_decoder else None,
        forced_bos_token_id=stated("forced_bos_token_id"),
        forced_eos_token_id=forced_ends[0] if forced_ends else None,
        begin_suppress_tokens=tuple(t for t in _token_ids(stated("begin_suppress_tokens")) if known([t])),
        min_length=stated("min_length"),
        max_length=stated("max_length"),
        max_new_tokens=stated("max_new_tokens"),
        repetition_penalty=float(stated("repetition_penalty", 1.0)),
        min_new_tokens=stated("min_new_tokens"),
        no_repeat_ngram_size=stated("no_repeat_ngram_size", 0),
        encoder_no_repeat_ngram_size=stated("encoder_no_repeat_ngram_size", 0),
        bad_words_ids=tuple(tuple(ids) for ids in stated("bad_words_ids", ()) if known(ids)),
        num_beams=stated("num_beams", 1),
        length_penalty=float(stated("length_penalty", 1.0)),
        early_stopping=stated("early_stopping", False),
        renormalize_logits=stated("renormalize_logits", False),
        lang_to_id=stated("lang_to_id", {}),
        task_to_id=stated("task_to_id", {}),
        no_timestamps_token_id=stated("no_timestamps_token_id"),
        max_initial_timestamp_index=stated("max_initial_timestamp_index"),
        prev_sot_token_id=stated("prev_sot_token_id"),
        alignment_heads=alignment_heads(model),
    )


def alignment_heads(model: Any) -> tuple[tuple[int, int], ...]:
    """(layer, head) of the cross-attention heads that follow the source in time, as the checkpoint names them; often none."""
    named = getattr(model.generation_config, "alignment_heads", None) or ()
    return tuple((int(layer), int(head)) for layer, head in named)


def _token_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def one_token(value: int | Sequence[int] | None) -> int | None:
    """A list names a start token for each sequence of a batch: usable when all are the same.

    Raises CheckpointError for different ones.
    """
    token_ids = set(_token_ids(value))
    if len(token_ids) > 1:
        raise CheckpointError(
            f"decoder_start_token_id is {value} in generation_config.json: one token for each sequence of a batch, and they "
            "differ. The rule: a bundle has one start token. Fix: write that token as a number."
        )
    return next(iter(token_ids), None)

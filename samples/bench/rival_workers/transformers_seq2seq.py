"""transformers on torch, encoder-decoders: fp32 and bf16; plain, prompt lookup and assisted decoding.

Prompt lookup searches what the decoder has written, never the source. An assistant reads the source with an encoder of its
own, which is part of its time. As in transformers_torch.py, prefill is the time of one token, and drafting is never given up.
"""

import os
from dataclasses import replace
from typing import Any

from .protocol import Answer, Rival, Served, Setup, main, split_by_length, version_of, with_end
from .recording import is_speech, log_mel
from .transformers_torch import LOOKUP_TOKENS
from .transformers_torch import RIVAL as DECODERS

RIVAL = Rival(
    name="transformers_seq2seq",
    program="transformers",
    packages=DECODERS.packages,
    weights=("fp32", "bf16"),
    groups=(("plain", "lookup k=5", "assistant"),),
    draft_weights="fp32",
    converts=False,
    shares=DECODERS.name,
)


def load(setup: Setup) -> Served:
    """Target and assistant, the assistant in the target's precision."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    torch.set_num_threads(setup.threads)
    target = _model(setup.model, setup.weights)
    assistant = _model(setup.draft, setup.weights) if setup.draft else None
    forwards = [0]
    target.get_decoder().register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    target.get_encoder().register_forward_pre_hook(lambda *_: forwards.__setitem__(0, 0))  # a generation begins

    def generate(request: dict[str, Any]) -> Answer:
        speculation = {
            "plain": {},
            "lookup k=5": {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
            "assistant": {"assistant_model": assistant},
        }[request["mode"]]
        answer = generate_with(target, setup.model, request, speculation)
        return replace(answer, forwards=forwards[0] - 1)

    return Served(version_of("transformers", "torch"), setup.modes, generate)


def _model(folder: str, weights: str) -> Any:
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

    kind = AutoModelForSpeechSeq2Seq if is_speech(folder) else AutoModelForSeq2SeqLM
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[weights]
    return kind.from_pretrained(folder, dtype=dtype).eval()


def generate_with(target: Any, folder: str, request: dict[str, Any], speculation: dict[str, Any]) -> Answer:
    """The answer of a model with the `generate` of transformers; `forwards` are those of plain decoding."""
    import torch

    source, start = _source(target, folder, request)
    end = target.generation_config.eos_token_id

    def run(new_tokens: int) -> list[int]:
        with torch.inference_mode():
            out = target.generate(max_new_tokens=new_tokens, do_sample=False, **source, **speculation)
        return with_end(without_start(out[0].tolist(), start), end, new_tokens)

    token_ids, prefill_s, decode_s = split_by_length(run, request["new_tokens"])
    return Answer(token_ids, prefill_s, decode_s, len(token_ids) - 1)


def _source(target: Any, folder: str, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """(arguments of `generate` that say what is read, what the decoder starts from)."""
    import torch

    rules = target.generation_config
    if not request["audio"]:
        ids = torch.tensor([request["prompt_ids"]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [rules.decoder_start_token_id]
    start = request["prompt_ids"]
    features = torch.from_numpy(log_mel(folder, request["audio"])).to(target.dtype)
    languages = {number: name for name, number in (getattr(rules, "lang_to_id", None) or {}).items()}
    told = {"language": languages[start[1]], "task": "transcribe"} if start[1] in languages else {}
    return {"input_features": features, "return_timestamps": False, **told}, start


def without_start(token_ids: list[int], start: list[int]) -> list[int]:
    """What was added: Whisper's `generate` returns start and end tokens in some modes and lengths, and not in others."""
    return token_ids[len(start) :] if token_ids[: len(start)] == start else token_ids


if __name__ == "__main__":
    main(None, load)

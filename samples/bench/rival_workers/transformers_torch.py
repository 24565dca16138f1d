"""transformers on torch: fp32 and bf16; plain, prompt lookup and assisted decoding.

It has no step, so prefill is the time of one token and decoding the rest. Its assisted decoding keeps drafting after a
wrong guess: there is no measured give-up. Plain fp32 is the reference of every other row.
"""

import os
from typing import Any

from .protocol import Answer, Rival, Served, Setup, main, split_by_length, version_of

RIVAL = Rival(
    name="transformers_torch",
    program="transformers",
    packages=("transformers==5.23.0", "torch==2.13.0"),
    weights=("fp32", "bf16"),
    groups=(("plain", "lookup k=5", "assistant"),),
    draft_weights="fp32",
    converts=False,
)
LOOKUP_TOKENS = 5  # of the example in its documentation


def load(setup: Setup) -> Served:
    """Target and assistant, the assistant in the target's precision."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    torch.set_num_threads(setup.threads)
    target = _model(setup.model, setup.weights)
    assistant = _model(setup.draft, setup.weights) if setup.draft else None
    target.generation_config.eos_token_id = None  # no end token: every generation runs to its full length
    forwards = [0]
    target.model.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))

    def generate(request: dict[str, Any]) -> Answer:
        speculation = {
            "plain": {},
            "lookup k=5": {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
            "assistant": {"assistant_model": assistant},
        }[request["mode"]]
        return _generate(target, speculation, request, forwards)

    def logits(token_ids: list[int]) -> Any:
        with torch.inference_mode():
            return target(torch.tensor([token_ids])).logits[0].float().numpy()

    return Served(version_of("transformers", "torch"), setup.modes, generate, logits=logits)


def _model(folder: str, weights: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[weights]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _generate(target: Any, speculation: dict[str, Any], request: dict[str, Any], forwards: list[int]) -> Answer:
    import torch

    prompt_ids = torch.tensor([request["prompt_ids"]])

    def run(new_tokens: int) -> list[int]:
        forwards[0] = 0
        with torch.inference_mode():
            out = target.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                **speculation,
            )
        return out[0, prompt_ids.shape[1] :].tolist()

    token_ids, prefill_s, decode_s = split_by_length(run, request["new_tokens"])
    return Answer(token_ids, prefill_s, decode_s, forwards[0] - 1)


if __name__ == "__main__":
    main(None, load)

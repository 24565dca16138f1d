"""Headstart itself: a bundle with every drafter it has, in the environment that runs rivals.py.

Bundles are given, not converted: `headstart export`, `quantize`, `build` and `tune` are measured as users ran them.
"""

from typing import Any

from .protocol import Answer, Rival, Served, Setup, main, version_of

RIVAL = Rival(name="headstart_bundle", program="Headstart", packages=(), weights=(), groups=((),), converts=False)


def load(setup: Setup) -> Served:
    """The bundle; plain first, so that the other modes have something to be compared with."""
    import headstart

    model = headstart.load(setup.model, threads=setup.threads, draft_model=setup.draft)

    def generate(request: dict[str, Any]) -> Answer:
        return _generate(model, request)

    version = version_of("headstart", "onnxruntime")
    return Served(version, ["plain", *model.drafters, "auto"], generate, _notes(model))


def _notes(model: Any) -> list[str]:
    return ["not tuned"] if model.tuning is None else [f"auto is {model.tuning.chosen}"]


def _generate(model: Any, request: dict[str, Any]) -> Answer:
    if model.tokenizer.encode(request["prompt"]) != request["prompt_ids"]:
        raise ValueError("the bundle's tokenizer is not the checkpoint's")
    drafter = "none" if request["mode"] == "plain" else request["mode"]
    result = model.generate(request["prompt"], drafter=drafter, max_new_tokens=request["new_tokens"], ignore_end=True)
    stats = result.stats
    return Answer(result.token_ids, stats.prefill_s, stats.decode_s, stats.verify_calls)


if __name__ == "__main__":
    main(None, load)

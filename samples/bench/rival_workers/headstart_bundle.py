"""Headstart itself: a bundle with every drafter it has, in the environment that runs the comparison.

Bundles are given, not converted: `headstart export`, `quantize`, `build` and `tune` are measured as users ran them. What is
no round of decoding counts as prefill: encoding the text, and making the cache.
"""

import time
from typing import Any

import numpy as np

from .protocol import Answer, Rival, Served, Setup, main, version_of
from .recording import filled, samples_of

RIVAL = Rival(name="headstart_bundle", program="Headstart", packages=(), weights=(), groups=((),), converts=False)


def load(setup: Setup) -> Served:
    """The bundle; plain first, so that the other modes have something to be compared with."""
    import headstart

    model = headstart.load(setup.model, threads=setup.threads, draft_model=setup.draft)

    def generate(request: dict[str, Any]) -> Answer:
        return _generate(model, request, setup.ends)

    version = version_of("headstart", "onnxruntime")

    def logits(token_ids: list[int]) -> Any:
        from headstart.exporter.comparison import all_logits

        return all_logits(model.engine, np.array(token_ids))

    return Served(version, ["plain", *model.drafters, "auto"], generate, _notes(model), logits)


def _notes(model: Any) -> list[str]:
    return ["not tuned"] if model.tuning is None else [f"auto is {model.tuning.chosen}"]


def _generate(model: Any, request: dict[str, Any], ends: bool) -> Answer:
    source = _recording(model, request) if request["audio"] else _text(model, request)
    drafter = "none" if request["mode"] == "plain" else request["mode"]
    start = time.perf_counter()
    result = model.generate(**source, drafter=drafter, max_new_tokens=request["new_tokens"], ignore_end=not ends)
    whole_s = time.perf_counter() - start
    stats = result.stats
    return Answer(result.token_ids, whole_s - stats.decode_s, stats.decode_s, stats.verify_calls)


def _text(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    if model.tokenizer.encode(request["prompt"]) != request["prompt_ids"]:
        raise ValueError("the bundle's tokenizer is not the checkpoint's")
    return {"prompt": request["prompt"]}


def _recording(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The features of one window, by the bundle's own front-end, and the decoder's start."""
    features = model.engine.features(filled(samples_of(request["audio"]), model.bundle.manifest.audio.window))
    return {"features": features, "decoder_prompt": request["prompt_ids"]}


if __name__ == "__main__":
    main(None, load)

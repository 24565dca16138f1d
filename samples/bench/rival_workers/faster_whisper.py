"""faster-whisper on CTranslate2's int8 and float32, as it comes and with the checkpoint's window. It has no speculation.

It supposes windows of 30 s in one constant. Where the checkpoint has another, "plain" fails and its row says how, and "plain
with its window" sets that constant, and fills the window with silence as Whisper is trained: by itself it fills up features
with zeros, which are no silence, and other tokens come out.

Its thresholds that skip or repeat a window are off, and what the checkpoint suppresses is given to it; otherwise it would
suppress what OpenAI's vocabulary suggests. Its clock begins at the samples.
"""

import functools
import json
from pathlib import Path
from typing import Any

from . import ctranslate2
from .protocol import Answer, Rival, Served, Setup, main, split_by_length, version_of, with_end
from .recording import filled, samples_of

RIVAL = Rival(
    name="faster_whisper",
    program="faster-whisper",
    packages=ctranslate2.RIVAL.packages,
    weights=ctranslate2.RIVAL.weights,
    groups=(("plain",), ("plain with its window",)),
    shares=ctranslate2.RIVAL.name,
)
UNGUARDED = {"no_speech_threshold": None, "log_prob_threshold": None, "compression_ratio_threshold": None}


def load(setup: Setup) -> Served:
    """The model, and where asked for the window of its features instead of 30 s."""
    import faster_whisper.transcribe as implementation

    options = {"device": "cpu", "compute_type": setup.weights, "cpu_threads": setup.threads}
    model = implementation.WhisperModel(setup.model, **options)
    window = 0
    if setup.modes == ["plain with its window"]:
        window, frames = model.feature_extractor.n_samples, model.feature_extractor.nb_max_frames
        implementation.pad_or_trim = functools.partial(implementation.pad_or_trim, length=frames)
    rules = json.loads(Path(setup.model, "generation_config.json").read_text("utf-8"))
    suppressed = {"suppress_tokens": rules.get("suppress_tokens") or [], "suppress_blank": True}
    once = {"beam_size": 1, "temperature": 0.0, "without_timestamps": True, "condition_on_previous_text": False}

    def generate(request: dict[str, Any]) -> Answer:
        samples = filled(samples_of(request["audio"]), window)
        return _generate(model, samples, request, rules, {**UNGUARDED, **suppressed, **once})

    return Served(version_of("faster-whisper", "ctranslate2"), setup.modes, generate, ["its times include the features"])


def _generate(model: Any, samples: Any, request: dict[str, Any], rules: dict[str, Any], options: dict[str, Any]) -> Answer:
    start = request["prompt_ids"]
    languages = {number: name.strip("<|>") for name, number in rules.get("lang_to_id", {}).items()}

    def run(new_tokens: int) -> list[int]:
        behind = ctranslate2.length_of(new_tokens, len(start)) - len(start)
        segments, _ = model.transcribe(samples, language=languages.get(start[1]), max_new_tokens=behind, **options)
        token_ids = [token for segment in segments for token in segment.tokens]
        return with_end(token_ids, rules["eos_token_id"], new_tokens)

    token_ids, prefill_s, decode_s = split_by_length(run, request["new_tokens"])
    return Answer(token_ids, prefill_s, decode_s, len(token_ids) - 1)


if __name__ == "__main__":
    main(ctranslate2.convert, load)

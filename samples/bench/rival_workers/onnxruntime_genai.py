"""onnxruntime-genai: models of its own builder; plain, n-gram and draft-model decoding.

Version 0.18 offers both kinds of speculation in the same generator loop ("speculative options", greedy and batch 1);
it has no tree and no heads for Llama. It steps token by token, so prefill and decoding are timed directly.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .protocol import Answer, Rival, Served, Setup, main, run_converter, version_of

# Settings are those its documentation starts from (docs/SpeculativeDecoding.md): fixed width 4, and adaptive width from 2.
SPECULATION: dict[str, dict[str, Any]] = {
    "plain": {},
    "ngram k=4": {"ngram_size": 3, "max_draft_tokens": 4},
    "ngram adaptive": {"ngram_size": 4, "max_draft_tokens": 8, "ngram_chained_lookup": True, "min_adaptive_k": 2},
    "draft k=4": {"max_draft_tokens": 4},
    "draft adaptive": {"min_adaptive_k": 2},
}
# The builder of 0.18.0 takes every linear layer with as many outputs as there are tokens for the LM head: with an MLP of just
# that size it writes the logits of the first layer, and all tokens are wrong. The LM head has a name; nothing else changes.
BUILDER = """
import runpy
import onnxruntime_genai.models  # makes its folder importable: the builder imports `builders` from there
from builders import base
base.Model.has_lm_head = lambda self, module: module is self.weights.lm_head
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
"""
RIVAL = Rival(
    name="onnxruntime_genai",
    program="onnxruntime-genai",
    packages=(
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.31.1",
        "transformers==5.23.0",  # its builder needs 5.2 or newer and does not say so
        "torch==2.13.0",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
    ),
    weights=("int4", "int8", "fp32"),
    groups=(("plain", "ngram k=4", "ngram adaptive"), ("draft k=4", "draft adaptive")),
    draft_weights="int8",
    recipe=2,
)


def convert(checkpoint: Path, weights: str, folder: Path) -> None:
    """The model builder with its defaults for the CPU."""
    builder = [sys.executable, "-c", BUILDER, "-i", str(checkpoint), "-o", str(folder)]
    with tempfile.TemporaryDirectory() as cache:
        run_converter([*builder, "-p", weights, "-e", "cpu", "-c", cache])


def load(setup: Setup) -> Served:
    """One model, with its draft model where the group drafts with one."""
    import onnxruntime_genai as og

    folder = _with_draft(setup) if setup.draft else setup.model
    config = og.Config(folder)
    config.overlay(json.dumps(_settings(setup)))
    model = og.Model(config)

    def generate(request: dict[str, Any]) -> Answer:
        return _generate(og, model, request)

    return Served(version_of("onnxruntime-genai", "onnxruntime"), setup.modes, generate)


def _settings(setup: Setup) -> dict[str, Any]:
    # Spinning is the default and pays for one pool. The pools of a target and a draft model would spin against each other.
    threads = {"intra_op_num_threads": setup.threads, "session.intra_op.allow_spinning": "0" if setup.draft else "1"}
    decoders = ["decoder", "draft"] if setup.draft else ["decoder"]
    return {"model": {"eos_token_id": _never_written(setup.model)} | {one: {"session_options": threads} for one in decoders}}


def _never_written(folder: str) -> int:
    """A stand-in for the end token, which cannot be switched off: the byte 255, which no text in UTF-8 contains."""
    vocabulary = json.loads(Path(folder, "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return int(vocabulary.get("ÿ", len(vocabulary) - 1))  # how byte-level vocabularies write it


def _with_draft(setup: Setup) -> str:
    """A folder with the target's configuration and the draft's decoder in it; both models must lie inside, so as links."""
    assert setup.draft is not None
    folder = Path(tempfile.mkdtemp(prefix="rivals-"))
    config = json.loads(Path(setup.model, "genai_config.json").read_text("utf-8"))
    draft = json.loads(Path(setup.draft, "genai_config.json").read_text("utf-8"))
    config["model"]["draft"] = draft["model"]["decoder"]
    for role, home in (("decoder", setup.model), ("draft", setup.draft)):
        (folder / role).symlink_to(home)
        config["model"][role]["filename"] = f"{role}/{config['model'][role]['filename']}"
    (folder / "genai_config.json").write_text(json.dumps(config), "utf-8")
    return str(folder)


def _generate(og: Any, model: Any, request: dict[str, Any]) -> Answer:
    prompt_ids, new_tokens = request["prompt_ids"], request["new_tokens"]
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt_ids) + new_tokens, do_sample=False)
    options = SPECULATION[request["mode"]]
    if options:
        params.set_speculative_options(**options)
    generator = og.Generator(model, params)
    start = time.perf_counter()
    generator.append_tokens(prompt_ids)  # runs the prompt: the first token is only picked from its logits
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        generator.generate_next_token()
    end = time.perf_counter()
    token_ids = [int(token) for token in generator.get_sequence(0)[len(prompt_ids) :]]
    return Answer(token_ids, prefilled - start, end - prefilled, _forwards(generator, options, new_tokens))


def _forwards(generator: Any, options: dict[str, Any], new_tokens: int) -> int:
    if not options:
        return new_tokens - 1
    stats = generator.get_speculative_stats()
    return int(stats.get("target_forward_passes", 0) + stats.get("standard_fallback_steps", 0))


if __name__ == "__main__":
    main(convert, load)

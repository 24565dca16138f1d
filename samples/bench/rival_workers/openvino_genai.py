"""OpenVINO GenAI: int8 and int4 of optimum-intel; plain, prompt lookup and draft model.

Each mode is a pipeline of its own, so each is a process of its own. Two settings of the numbers are measured: the
defaults (u8 cache, int8 activations in groups), which speculation does not leave lossless, and "exact", where the cache
and the activations are float. It has no step, so prefill is the time of one token. EAGLE-3 and DFlash exist for models
that have such a head; Medusa heads do not.
"""

import sys
from pathlib import Path
from typing import Any

from .protocol import Answer, Logits, Rival, Served, Setup, main, run_converter, split_by_length, version_of

DRAFTED_TOKENS = 5  # of its samples for both prompt lookup and draft models
LOOKUP_NGRAM = 3
EXACT = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
RIVAL = Rival(
    name="openvino_genai",
    program="OpenVINO GenAI",
    packages=(
        "openvino-genai==2026.4.1",
        "optimum-intel==2.2.0",
        "nncf==3.4.0",
        "transformers==4.57.6",  # the newest that optimum-intel exports every architecture with
        "torch==2.13.0",
    ),
    weights=("int8", "int4"),
    groups=(("plain",), ("lookup k=5",), ("draft k=5",), ("plain exact",), ("draft k=5 exact",)),
    draft_weights="int8",
    unwanted=("torchvision",),  # built for CUDA's torch: with the CPU build, importing it fails, and transformers with it
)


def convert(checkpoint: Path, weights: str, folder: Path) -> None:
    """optimum-intel's export with its defaults; a group size only gives way where it does not divide a small model."""
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "-m", str(checkpoint)]
    fallback = ["--group-size-fallback", "adjust"] if weights == "int4" else []
    task = ["--task", "text-generation-with-past", "--weight-format", weights]
    run_converter([*command, *task, *fallback, str(folder)])


def load(setup: Setup) -> Served:
    """The pipeline of one mode."""
    import openvino_genai

    (mode,) = setup.modes
    pipeline = openvino_genai.LLMPipeline(setup.model, "CPU", **_properties(openvino_genai, setup, mode))
    config = _generation_config(openvino_genai, mode)

    def generate(request: dict[str, Any]) -> Answer:
        return _generate(pipeline, config, request)

    return Served(version_of("openvino-genai"), setup.modes, generate, logits=_logits(setup, mode))


def _logits(setup: Setup, mode: str) -> Logits:
    """The pipeline tells no logits: its model, compiled once more when it is asked."""

    def logits(token_ids: list[int]) -> Any:
        import numpy as np
        import openvino

        exact = EXACT if "exact" in mode else {}
        compiled = openvino.Core().compile_model(f"{setup.model}/openvino_model.xml", "CPU", dict(exact))
        row = np.array([token_ids], np.int64)
        given = {
            "input_ids": row,
            "attention_mask": np.ones_like(row),
            "position_ids": np.arange(row.size)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        taken = {name for port in compiled.inputs for name in port.get_names()}
        return compiled({name: value for name, value in given.items() if name in taken})["logits"][0]

    return logits


def _properties(openvino_genai: Any, setup: Setup, mode: str) -> dict[str, Any]:
    device = {"INFERENCE_NUM_THREADS": setup.threads, **(EXACT if "exact" in mode else {})}
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # on in this pipeline: a prompt seen before would cost nothing
    scheduler.max_num_batched_tokens = sys.maxsize  # what the pipeline sets when no scheduler is given: prompts in one piece
    properties = {"scheduler_config": scheduler, **device}
    if mode.startswith("lookup"):
        properties["prompt_lookup"] = True
    if mode.startswith("draft"):
        properties["draft_model"] = openvino_genai.draft_model(setup.draft, "CPU", **device)
    return properties


def _generation_config(openvino_genai: Any, mode: str) -> Any:
    config = openvino_genai.GenerationConfig()
    config.ignore_eos = True
    if not mode.startswith("plain"):
        config.num_assistant_tokens = DRAFTED_TOKENS
    if mode.startswith("lookup"):
        config.max_ngram_size = LOOKUP_NGRAM
    return config


def _generate(pipeline: Any, config: Any, request: dict[str, Any]) -> Answer:
    import numpy as np
    import openvino

    prompt = openvino.Tensor(np.array([request["prompt_ids"]], dtype=np.int64))
    found: list[Any] = []

    def run(new_tokens: int) -> list[int]:
        config.max_new_tokens = new_tokens
        found[:] = [pipeline.generate(prompt, config)]
        return [int(token) for token in found[0].tokens[0]]

    token_ids, prefill_s, decode_s = split_by_length(run, request["new_tokens"])
    return Answer(token_ids, prefill_s, decode_s, _forwards(found[0]))


def _forwards(result: Any) -> int:
    """One entry per forward of the target, the prompt's first; a speculative one has several tokens."""
    return len(result.perf_metrics.raw_metrics.m_batch_sizes) - 1


if __name__ == "__main__":
    main(convert, load)

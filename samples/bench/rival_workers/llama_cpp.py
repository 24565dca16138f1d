"""llama.cpp through llama-cpp-python: Q8_0 and Q4_0; plain and prompt lookup.

The Python package offers no draft model and no heads: those are in llama.cpp's C++ programs only. It is built from its
source package (about 20 minutes on two cores). The GGUF file is written here, since the package ships no converter, and
quantized by llama.cpp itself. Its vocabulary is dummies: every prompt arrives as token ids.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .protocol import Answer, Rival, Served, Setup, main, version_of

RIVAL = Rival(
    name="llama_cpp",
    program="llama.cpp (Python)",
    packages=("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6", "safetensors==0.8.0"),
    weights=("Q8_0", "Q4_0"),
    groups=(("plain",), ("lookup k=2",), ("lookup k=10",)),
)
LOOKUP_TOKENS = {"plain": None, "lookup k=2": 2, "lookup k=10": 10}  # 2: its README's advice for CPUs; 10: its default
NAMES = {  # Hugging Face's name inside a layer → llama.cpp's
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(checkpoint: Path, weights: str, folder: Path) -> None:
    """A float file of our own, quantized by llama.cpp."""
    import llama_cpp

    folder.mkdir()
    plain = folder / "f32.gguf"
    _write_gguf(checkpoint, plain)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[weights]
    if llama_cpp.llama_model_quantize(bytes(plain), bytes(folder / "model.gguf"), options):
        raise RuntimeError(f"llama.cpp could not quantize {plain} to {weights}")
    plain.unlink()


def _write_gguf(checkpoint: Path, file: Path) -> None:
    import gguf

    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    writer = gguf.GGUFWriter(file, "llama")
    _write_shape(writer, config)
    _write_vocabulary(writer, config["vocab_size"])
    for name, tensor in _tensors(checkpoint, config):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: Any, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _write_vocabulary(writer: Any, size: int) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>".encode() for index in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([1] * size)  # 1: a normal token
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _tensors(checkpoint: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    import numpy as np
    from safetensors.numpy import load_file

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        projection = name.split(".")[-2]
        tensor = tensor.astype(np.float32)
        yield _gguf_name(name), _permuted(tensor, heads[projection]) if projection in heads else tensor


def _gguf_name(name: str) -> str:
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in outside:
        return f"{outside[stem]}.weight"
    _, _, layer, inside = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inside]}.weight"


def _permuted(tensor: Any, heads: int) -> Any:
    """Rows of one head from halves (Hugging Face's rotary) to pairs (llama.cpp's)."""
    rows, columns = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def load(setup: Setup) -> Served:
    """One context, with the defaults of the Python package; the mode decides whether it looks up."""
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    (mode,) = setup.modes
    count = LOOKUP_TOKENS[mode]
    llm = Llama(
        str(Path(setup.model, "model.gguf")),
        n_ctx=0,  # the model's own length
        n_threads=setup.threads,
        n_threads_batch=setup.threads,
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=count) if count else None,
        verbose=False,
    )
    forwards = _counted(llm)

    def generate(request: dict[str, Any]) -> Answer:
        return _generate(llm, request, forwards)

    return Served(version_of("llama-cpp-python"), setup.modes, generate)


def _counted(llm: Any) -> list[int]:
    """Counts the calls that run the model: `eval` is the package's only way to do so."""
    forwards, evaluate = [0], llm.eval

    def counting(tokens: Any) -> None:
        forwards[0] += 1
        evaluate(tokens)

    llm.eval = counting
    return forwards


def _generate(llm: Any, request: dict[str, Any], forwards: list[int]) -> Answer:
    llm.reset()  # or a prompt seen before would cost nothing
    forwards[0] = 0
    start = time.perf_counter()
    tokens = llm.generate(request["prompt_ids"], temp=0.0, repeat_penalty=1.0)
    token_ids = [next(tokens)]
    first = time.perf_counter()
    token_ids += [next(tokens) for _ in range(request["new_tokens"] - 1)]
    end = time.perf_counter()
    return Answer(token_ids, first - start, end - first, forwards[0] - 1)


if __name__ == "__main__":
    main(convert, load)

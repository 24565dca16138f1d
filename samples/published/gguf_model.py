"""A decoder in a GGUF file, as llama.cpp takes it, to a Hugging Face folder. transformers reads the file; quantized blocks are
widened to float32."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headstart.runtime.errors import CheckpointError

NEEDED = ("gguf", "accelerate")


def convert(file: Path, folder: Path) -> None:
    """Write the Hugging Face folder.

    Raises CheckpointError where packages are missing that transformers needs, or for a file that it cannot read.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"Reading GGUF needs {' and '.join(missing)}. Fix: pip install 'headstart[export,published]'.")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} is no GGUF that transformers reads: {error}. Fix: fetch it again.") from error
    _forget_quantization(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _forget_quantization(model: Any) -> None:
    """The weights are floats now; saved as quantized, the folder could not be loaded."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.__dict__.pop("quantization_method", None)

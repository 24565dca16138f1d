"""A Hugging Face checkpoint: where it lies, which class it needs, its weights in memory.

Turns everything that can be wrong with a checkpoint into one CheckpointError. Knows nothing of ONNX.
"""

import contextlib
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from headstart.runtime.errors import CheckpointError
from headstart.runtime.output import sha256_of

TASK = "text-generation"
# Classes whose encoder reads text or speech. optimum's tasks name some of them after other things they can do.
ENCODER_DECODERS = {
    *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
    *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values(),
}
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model in evaluation mode and the folder it came from."""

    path: Path
    config: Any
    model: torch.nn.Module

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @property
    def has_encoder(self) -> bool:
        return self.architecture in ENCODER_DECODERS


def load_checkpoint(source: str | Path, dtype: str = "float32") -> Checkpoint:
    """Load a checkpoint folder, or a hub name, with weights in `dtype`.

    Raises CheckpointError when it is missing, truncated, of an unknown architecture, or generates no text.
    """
    path = local_folder(source)
    with _quiet_transformers():
        config = _config(path)
        model_class = _model_class(path, config)
        model = _load_weights(path, model_class, config, getattr(torch, dtype))
    return Checkpoint(path, model.config, model.eval())


def local_folder(source: str | Path) -> Path:
    """`source` itself when it is a folder, else the hub's snapshot of that name."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.is_file():
        raise CheckpointError(
            f"{path} is a GGUF file; export reads Hugging Face folders. Fix: the checkpoint that it was made of; or load it "
            f"with transformers (AutoModelForCausalLM.from_pretrained({str(path.parent)!r}, gguf_file={path.name!r})), "
            "delete its quantization_config, and save model and tokenizer to a folder."
        )
    if path.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1 or path.exists():
        raise CheckpointError(
            f"{source} is not a folder. A checkpoint is a folder with config.json and weights, or a hub name."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(source)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{source} is neither a folder here nor a checkpoint the hub gave ({type(error).__name__}). "
            "Fix: check the path, or the name and your connection."
        ) from error


def source_hashes(path: Path) -> dict[str, str]:
    """sha256 of the files that decide what the model computes."""
    files = [path / "config.json", *(file for pattern in WEIGHT_PATTERNS for file in sorted(path.glob(pattern)))]
    return {file.name: sha256_of(file) for file in files if file.is_file()}


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    # Its loading report and progress bars would stand between ours.
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _config(path: Path) -> Any:
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} holds no config.json. A checkpoint is a folder with config.json and weights.")
    try:
        model_type = json.loads(file.read_text("utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is no valid JSON object ({error}). Fix: download it again.") from error
    if model_type not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING_NAMES, n=3)
        raise CheckpointError(
            f"{file}: model_type {model_type!r} is not an architecture of the installed transformers. "
            f"Nearest: {', '.join(near) or 'none'}. Fix: a newer transformers, or correct model_type."
        )
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # a config class may raise anything on values it does not expect
        raise CheckpointError(f"{file} is refused by transformers: {error}") from error


def _model_class(path: Path, config: Any) -> Any:
    """The class the checkpoint names, when it is an encoder-decoder or optimum says that it generates text."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    names = getattr(config, "architectures", None) or []
    if names and names[0] in ENCODER_DECODERS and config.is_encoder_decoder:  # some read audio with a decoder alone
        return getattr(transformers, names[0])
    if not names:
        return TasksManager.get_model_class_for_task(TASK, model_type=config.model_type)
    try:
        model_class = TasksManager.get_model_class_for_task(TASK, model_type=config.model_type, model_class_name=names[0])
        task = TasksManager.infer_task_from_model(model_class)
    except (AttributeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: architecture {names[0]} is not in the installed transformers ({error}).") from error
    if TasksManager.map_from_synonym(task) != TASK:
        raise CheckpointError(
            f"{path}: {names[0]} does {task}; this version exports {TASK} (…ForCausalLM) and encoder-decoders for text or "
            f"speech (…ForConditionalGeneration). Fix: such a checkpoint of the {config.model_type} family."
        )
    return model_class


def _load_weights(path: Path, model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    if not any(True for pattern in WEIGHT_PATTERNS for _ in path.glob(pattern)):
        raise CheckpointError(f"{path} holds no weights. Looked for: {', '.join(WEIGHT_PATTERNS)}.")
    try:
        model, info = model_class.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True)
    except Exception as error:  # readers of each file format raise their own kinds
        raise CheckpointError(f"{path}: the weights cannot be read ({error}). Fix: download or copy them again.") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{path}: {len(missing)} weights are missing, {missing[0]} first. "
            "A missing weight would be random. Fix: download or copy the checkpoint again."
        )
    return model

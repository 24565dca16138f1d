"""Checkpoint to bundle: load, trace, write, and rename into place."""

import datetime
import importlib.metadata
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headstart.runtime.bundle import (
    SCHEMA_VERSION,
    Bundle,
    GenerationRules,
    GraphInfo,
    Manifest,
    ModelInfo,
    Provenance,
    new_folder,
    write_manifest,
)
from headstart.runtime.errors import CheckpointError, OptionError, missing_extra

Progress = Callable[[str], None]  # called with the name of each stage as it begins
DTYPES = ("float32", "float16", "bfloat16")
DECODER = "graphs/decoder.onnx"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export(
    checkpoint: str | Path,
    output: str | Path,
    heads: Sequence[str | Path] = (),
    dtype: str = "float32",
    max_cache: int | None = None,
    aux_layers: Sequence[int] = (),
    force: bool = False,
    progress: Progress = lambda stage: None,
) -> Bundle:
    """Export a decoder checkpoint, with draft heads, to a bundle.

    Args:
        checkpoint: folder or hub name of a …ForCausalLM checkpoint.
        output: the bundle's folder; must not exist unless `force`.
        heads: folders of draft heads in a published format.
        dtype: of weights and activations: float32, float16 or bfloat16.
        max_cache: the longest text in tokens; the model's own limit when None.
        aux_layers: layers whose outputs heads read, as indices into transformers' `hidden_states`.
        force: replace an existing output.
        progress: told each stage's name.

    Raises:
        CheckpointError, HeadError, OutputError, OptionError; nothing is left at `output` then.
    """
    _check_options(dtype, max_cache)
    try:
        from . import checkpoint as loading
    except ModuleNotFoundError as error:
        raise missing_extra(error, "Exporting") from error
    with new_folder(Path(output), force) as folder:
        progress("loading the checkpoint")
        source = loading.load_checkpoint(checkpoint, dtype)
        manifest = _write_decoder(source, folder, max_cache, tuple(aux_layers), str(checkpoint), progress)
        manifest = _add_heads(manifest, folder, heads, progress)
        progress("hashing files")
        write_manifest(folder, manifest)
    return Bundle.load(output, check_hashes=False)


def _check_options(dtype: str, max_cache: int | None) -> None:
    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype!r} is unknown. Choose one of: {', '.join(DTYPES)}.")
    if max_cache is not None and max_cache < 16:
        raise OptionError(f"--max-cache {max_cache} is too small: at least 16 tokens are needed.")


def _write_decoder(
    source: Any, folder: Path, max_cache: int | None, aux_layers: tuple[int, ...], name: str, progress: Progress
) -> Manifest:
    from . import checkpoint, golden, graph, tracing

    config = source.config.get_text_config()
    _check_aux_layers(aux_layers, config.num_hidden_layers)
    progress("tracing the decoder")
    caches = tracing.cache_infos(source.model)
    traced = tracing.trace_decoder(source.model, caches, aux_layers)
    progress("writing graphs")
    graph.name_weights(traced)
    graph.save_graph(traced, folder / DECODER)
    info = graph.graph_info(traced, DECODER)
    model = _model_info(source, info, len(caches), max_cache, aux_layers)
    copy_tokenizer(source.path, folder / "tokenizer")
    progress("recording golden outputs")
    golden.write_golden(source.model, folder, model.vocab_size, model.max_cache)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=model,
        graphs={"decoder": info},
        caches=caches,
        generation=generation_rules(source.model),
        provenance=provenance(name, checkpoint.source_hashes(source.path)),
        weights=graph.weight_infos(folder / DECODER, "graphs"),
    )


def _check_aux_layers(aux_layers: tuple[int, ...], layers: int) -> None:
    wrong = [i for i in aux_layers if not 0 <= i <= layers]
    if wrong:
        raise OptionError(f"--aux-layers {wrong[0]}: this model has hidden states 0 to {layers}.")


def _model_info(source: Any, info: GraphInfo, layers: int, max_cache: int | None, aux_layers: tuple[int, ...]) -> ModelInfo:
    config = source.config.get_text_config()
    logits, hidden = info.outputs[:2]
    longest = getattr(config, "max_position_embeddings", None) or max_cache
    if longest is None:
        raise CheckpointError(f"{source.path}: the configuration states no longest text. Fix: --max-cache N.")
    if max_cache is not None and max_cache > longest:
        raise OptionError(f"--max-cache {max_cache} is more than the model's own limit of {longest} tokens.")
    return ModelInfo(
        architecture=source.architecture,
        family="decoder",
        dtype=logits.dtype,
        vocab_size=int(logits.shape[2]),
        hidden_size=int(hidden.shape[2]),
        layers=layers,
        max_cache=max_cache or longest,
        parameters=sum(p.numel() for p in source.model.parameters()),
        aux_layers=aux_layers,
    )


def generation_rules(model: Any) -> GenerationRules:
    """What the checkpoint's generation_config (or config) says of end, begin and suppressed tokens."""
    settings = model.generation_config
    end = settings.eos_token_id
    ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
    return GenerationRules(ends, settings.bos_token_id, tuple(settings.suppress_tokens or ()))


def provenance(source: str, hashes: dict[str, str]) -> Provenance:
    packages = ("headstart", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "optimum")
    return Provenance(
        command=shlex.join(["headstart", *sys.argv[1:]]) if Path(sys.argv[0]).name == "headstart" else "headstart.export",
        source=Path(source).name,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        versions={name: importlib.metadata.version(name) for name in packages},
        source_sha256=hashes,
    )


def copy_tokenizer(source: Path, target: Path) -> None:
    """tokenizer.json as it is, or made by transformers from the older formats; chat template and settings go along."""
    target.mkdir()
    if not (source / "tokenizer.json").is_file():
        return _convert_tokenizer(source, target)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return None


def _convert_tokenizer(source: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
    except Exception as error:  # each tokenizer class raises its own kinds
        raise CheckpointError(f"{source} holds no tokenizer.json and no tokenizer that can become one ({error}).") from error
    if not (target / "tokenizer.json").is_file():
        raise CheckpointError(f"{source}: its tokenizer has no fast form (tokenizer.json), which the torch-free runtime needs.")


def _add_heads(manifest: Manifest, folder: Path, heads: Sequence[str | Path], progress: Progress) -> Manifest:
    for head in heads:
        from .heads.medusa import add_head

        progress("adding heads")
        manifest = add_head(folder, manifest, Path(head))
    return manifest

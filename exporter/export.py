"""Checkpoint to bundle: load, trace, write, and rename into place."""

import dataclasses
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
    write_manifest,
)
from headstart.runtime.errors import CheckpointError, EngineError, MissingExtraError, OptionError, missing_extra
from headstart.runtime.output import new_folder

Progress = Callable[[str], None]  # called with the name of each stage as it begins
DTYPES = ("float32", "float16", "bfloat16")
DECODER, ENCODER = "graphs/decoder.onnx", "graphs/encoder.onnx"
UNSTATED_CACHE = 512  # tokens, for models with relative positions alone, which name no limit
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
    assistant_of: str | Path | None = None,
) -> Bundle:
    """Export a checkpoint, with draft heads, to a bundle.

    Args:
        checkpoint: folder or hub name of a decoder (…ForCausalLM), or of an encoder-decoder for text or speech.
        output: the bundle's folder; must not exist unless `force`.
        heads: folders of draft heads in a published format.
        dtype: of weights and activations: float32, float16 or bfloat16.
        max_cache: the longest text in tokens; the model's own limit when None.
        aux_layers: layers whose outputs heads read, as indices into transformers' `hidden_states`.
        force: replace an existing output.
        progress: told each stage's name.
        assistant_of: the bundle of a target with the very same encoder (Distil-Whisper). The new one then has none of its own,
            and drafts for that target from the states which the target's encoder makes anyway.

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
        write = _write_encoder_decoder if source.has_encoder else _write_decoder
        if assistant_of is not None:
            _check_assistant(source, Bundle.load(assistant_of, check_hashes=False))
            write = _write_assistant
        manifest = write(source, folder, max_cache, tuple(aux_layers), str(checkpoint), progress)
        manifest = _add_overflows(manifest, folder, progress)
        manifest = _add_heads(manifest, folder, heads, progress)
        progress("hashing files")
        write_manifest(folder, manifest)
    return Bundle.load(output, check_hashes=False)


def _add_overflows(manifest: Manifest, folder: Path, progress: Progress) -> Manifest:
    """What float16 cannot hold, for builds of other devices: they may have no ONNX Runtime to find out."""
    from .overflow import overflowing

    if manifest.model.dtype != "float32":
        return manifest
    progress("looking for values beyond float16's range")
    try:
        return dataclasses.replace(manifest, overflows=overflowing(folder, manifest))
    except (MissingExtraError, EngineError) as error:  # exporting itself needs no ONNX Runtime: building looks again
        progress(f"values beyond float16's range were not looked for: {error}")
        return manifest


def _check_options(dtype: str, max_cache: int | None) -> None:
    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype!r} is unknown. Choose one of: {', '.join(DTYPES)}.")
    if max_cache is not None and max_cache < 16:
        raise OptionError(f"--max-cache {max_cache} is too small: at least 16 tokens are needed.")


def _check_assistant(source: Any, target: Bundle) -> None:
    from . import seq2seq

    if not source.has_encoder or seq2seq.encoder_sha256(source.model) != target.manifest.model.encoder_sha256:
        raise CheckpointError(
            f"{source.path} cannot be an assistant of {target.path}: an assistant has the target's very encoder, weight by "
            "weight and in the same --dtype. Fix: export it without --assistant-of; it then drafts with its own encoder."
        )


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
    longest = longest_text(source, getattr(config, "max_position_embeddings", None), max_cache)
    model = _model_info(source, info, len(caches), longest, aux_layers)
    copy_tokenizer(source.path, folder / "tokenizer")
    progress("recording golden outputs")
    golden.write_golden(source.model, folder, model.vocab_size, model.max_cache)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=model,
        graphs={"decoder": info},
        caches=caches,
        generation=generation_rules(source.model, model.vocab_size),
        provenance=provenance(name, checkpoint.source_hashes(source.path)),
        weights=graph.weight_infos(folder / DECODER, "graphs"),
    )


def _write_assistant(
    source: Any, folder: Path, max_cache: int | None, aux_layers: tuple[int, ...], name: str, progress: Progress
) -> Manifest:
    return _write_encoder_decoder(source, folder, max_cache, aux_layers, name, progress, assistant=True)


def _write_encoder_decoder(
    source: Any,
    folder: Path,
    max_cache: int | None,
    aux_layers: tuple[int, ...],
    name: str,
    progress: Progress,
    assistant: bool = False,
) -> Manifest:
    from . import checkpoint, frontend, golden, graph, seq2seq

    progress("tracing the encoder")
    caches, cross_caches = seq2seq.cache_infos(source.model)
    _check_aux_layers(aux_layers, len(caches))
    encoder = (seq2seq.trace_assistant if assistant else seq2seq.trace_encoder)(source.model, cross_caches)
    progress("tracing the decoder")
    decoder = seq2seq.trace_decoder(source.model, caches, cross_caches, aux_layers)
    progress("writing graphs")
    for traced in (decoder, encoder):
        graph.name_weights(traced)
    graph.save_graph(decoder, folder / DECODER)
    graph.save_beside(encoder, folder / ENCODER, folder / DECODER)
    graphs = {"decoder": graph.graph_info(decoder, DECODER), "encoder": graph.graph_info(encoder, ENCODER)}
    limits = seq2seq.limits(source.model)
    longest = longest_text(source, limits.text or max_cache or UNSTATED_CACHE, max_cache)
    model = _model_info(source, graphs["decoder"], len(caches), longest, aux_layers)
    model = dataclasses.replace(
        model,
        family="encoder-decoder",
        source=limits.kind,
        max_source=limits.source,
        encoder_sha256=seq2seq.encoder_sha256(source.model),
    )
    sources, states = _golden_sources(source.model, model), None
    if assistant:
        model = dataclasses.replace(model, source="states", max_source=0)
        states = seq2seq.golden_states(source.model, sources)
    copy_tokenizer(source.path, folder / "tokenizer")
    rules = generation_rules(source.model, model.vocab_size)
    progress("recording golden outputs")
    golden.write_golden(source.model, folder, model.vocab_size, model.max_cache, sources, states)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=model,
        graphs=graphs,
        caches=caches,
        cross_caches=cross_caches,
        generation=rules,
        provenance=provenance(name, checkpoint.source_hashes(source.path)),
        weights=graph.weight_infos(folder / DECODER, "graphs"),
    )
    return frontend.add_frontend(source.path, folder, manifest) if model.source == "audio" else manifest


def _golden_sources(model: Any, info: ModelInfo) -> Any:
    from . import golden, seq2seq

    if info.source == "audio":
        return golden.golden_features(seq2seq.feature_shape(model, seq2seq.AUDIO_LENGTH[seq2seq.encoder_input(model)]))
    return golden.golden_inputs(info.vocab_size, info.max_source or info.max_cache, seed=1)


def _check_aux_layers(aux_layers: tuple[int, ...], layers: int) -> None:
    wrong = [i for i in aux_layers if not 0 <= i <= layers]
    if wrong:
        raise OptionError(f"--aux-layers {wrong[0]}: this model has hidden states 0 to {layers}.")


def longest_text(source: Any, stated: int | None, max_cache: int | None) -> int:
    """Tokens: what the user asks for, within what the model states."""
    longest = stated or max_cache
    if longest is None:
        raise CheckpointError(f"{source.path}: the configuration states no longest text. Fix: --max-cache N.")
    if max_cache is not None and max_cache > longest:
        raise OptionError(f"--max-cache {max_cache} is more than the model's own limit of {longest} tokens.")
    return max_cache or longest


def _model_info(source: Any, info: GraphInfo, layers: int, max_cache: int, aux_layers: tuple[int, ...]) -> ModelInfo:
    logits, hidden = info.outputs[:2]
    return ModelInfo(
        architecture=source.architecture,
        family="decoder",
        dtype=logits.dtype,
        vocab_size=int(logits.shape[2]),
        hidden_size=int(hidden.shape[2]),
        layers=layers,
        max_cache=max_cache,
        parameters=sum(p.numel() for p in source.model.parameters()),
        aux_layers=aux_layers,
    )


def generation_rules(model: Any, vocab_size: int) -> GenerationRules:
    """What the checkpoint's generation_config (or config) says of end, begin, forced and suppressed tokens, and lengths.

    Tokens that the model does not have are left out: Whisper's configuration suppresses some of its usual vocabulary.
    """
    settings = model.generation_config

    def known(token_ids: Sequence[int]) -> bool:
        return all(0 <= token < vocab_size for token in token_ids)

    def stated(name: str, default: Any = None) -> Any:
        value = getattr(settings, name, None)
        return default if value is None else value

    start = stated("decoder_start_token_id", settings.bos_token_id)
    forced_ends = _token_ids(stated("forced_eos_token_id"))
    return GenerationRules(
        eos_token_ids=_token_ids(settings.eos_token_id),
        bos_token_id=settings.bos_token_id,
        suppress_tokens=_token_ids(stated("suppress_tokens")),
        pad_token_id=stated("pad_token_id"),
        decoder_start_token_id=start if model.config.is_encoder_decoder else None,
        forced_bos_token_id=stated("forced_bos_token_id"),
        forced_eos_token_id=forced_ends[0] if forced_ends else None,
        begin_suppress_tokens=tuple(t for t in _token_ids(stated("begin_suppress_tokens")) if known([t])),
        min_length=stated("min_length"),
        max_length=stated("max_length"),
        min_new_tokens=stated("min_new_tokens"),
        no_repeat_ngram_size=stated("no_repeat_ngram_size", 0),
        encoder_no_repeat_ngram_size=stated("encoder_no_repeat_ngram_size", 0),
        bad_words_ids=tuple(tuple(ids) for ids in stated("bad_words_ids", ()) if known(ids)),
        num_beams=stated("num_beams", 1),
        length_penalty=float(stated("length_penalty", 1.0)),
        early_stopping=stated("early_stopping", False),
        renormalize_logits=stated("renormalize_logits", False),
        lang_to_id=stated("lang_to_id", {}),
        task_to_id=stated("task_to_id", {}),
        no_timestamps_token_id=stated("no_timestamps_token_id"),
        max_initial_timestamp_index=stated("max_initial_timestamp_index"),
        prev_sot_token_id=stated("prev_sot_token_id"),
    )


def _token_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


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

    from . import pieces

    try:
        if pieces.has_own_vocabulary(source):
            pieces.convert(source).save(str(target / "tokenizer.json"))
            return
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
    except CheckpointError:
        raise
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

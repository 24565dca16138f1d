"""Checkpoint to bundle: load, trace, write, and rename into place."""

import dataclasses
import datetime
import importlib.metadata
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.runtime.bundle import (
    SCHEMA_VERSION,
    Bundle,
    GraphInfo,
    Manifest,
    ModelInfo,
    Provenance,
    write_manifest,
)
from headstart.runtime.errors import CheckpointError, EngineError, MissingExtraError, OptionError, missing_extra
from headstart.runtime.output import new_folder

if TYPE_CHECKING:
    from .heads.families import RecognisedHead
from .generation_rules import generation_rules, notes

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
    check: bool = True,
) -> Bundle:
    """Export a checkpoint, with draft heads, to a bundle.

    Args:
        checkpoint: folder or hub name of a decoder (…ForCausalLM), or of an encoder-decoder for text or speech.
        output: the bundle's folder; must not exist unless `force`.
        heads: folders of draft heads in a published format; the layers they read are added to `aux_layers`.
        dtype: of weights and activations: float32, float16 or bfloat16.
        max_cache: the longest text in tokens; the model's own limit when None.
        aux_layers: layers whose outputs heads read, as indices into transformers' `hidden_states`.
        force: replace an existing output.
        progress: told each stage's name.
        assistant_of: the bundle of a target with the very same encoder (Distil-Whisper). The new one then has none of its own,
            and drafts for that target from the states which the target's encoder makes anyway.
        check: compare the exported graphs with the checkpoint (see `comparison`); needs ONNX Runtime.

    Raises:
        CheckpointError, HeadError, OutputError, OptionError; nothing is left at `output` then.
    """
    _check_options(dtype, max_cache)
    try:
        from . import checkpoint as loading
    except ModuleNotFoundError as error:
        raise missing_extra(error, "Exporting") from error
    recognised = _recognised(heads)
    with new_folder(Path(output), force) as folder:
        progress("loading the checkpoint")
        source = loading.load_checkpoint(checkpoint, dtype)
        write = _write_encoder_decoder if source.has_encoder else _write_decoder
        if assistant_of is not None:
            _check_assistant(source, Bundle.load(assistant_of, check_hashes=False))
            write = _write_assistant
        read = _layers_read(source, recognised, aux_layers)
        manifest, reference = write(source, folder, max_cache, read, str(checkpoint), progress)
        said = [*notes(source.model), *_model_notes(source.model, manifest.model.max_cache)]
        if check:
            said += _compare(Bundle(folder, manifest), reference, progress)
        for note in said:
            progress(note)
        manifest = dataclasses.replace(manifest, provenance=dataclasses.replace(manifest.provenance, notes=tuple(said)))
        manifest = _add_overflows(manifest, folder, progress)
        manifest = _add_heads(manifest, folder, recognised, progress)
        progress("hashing files")
        write_manifest(folder, manifest)
    return Bundle.load(output, check_hashes=False)


def _compare(bundle: Bundle, reference: Any, progress: Progress) -> list[str]:
    """Returns why the graphs could not be compared, if so. Raises CheckpointError when they compute something else."""
    from .comparison import compare_export

    progress("comparing with the checkpoint")
    try:
        compare_export(bundle, reference)
    except (MissingExtraError, EngineError) as error:
        return [f"The exported graphs were not compared with the checkpoint: {error}"]
    return []


def _model_notes(model: Any, longest: int) -> list[str]:
    """Where the bundle costs more than the architecture suggests, or transformers contradicts itself."""
    from . import architectures, rope

    notes = []
    original = rope.variants(model, longest).original
    if original:
        notes.append(
            f"LongRoPE: beyond {original} tokens the frequencies change, so the graph runs and caches both variants of the "
            f"model. --max-cache {original} halves that cost."
        )
    if not model.config.is_encoder_decoder and architectures.shifted_embeddings(model):
        notes.append("Positions are those of the model's own forward; generate() of transformers 5 counts them from 0.")
    return notes


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
) -> tuple[Manifest, Any]:
    from . import architectures, checkpoint, conformance, golden, graph, rope, tracing

    config = source.config.get_text_config()
    _check_aux_layers(aux_layers, tracing.decoder_layers(source.model))
    tracing.cache_infos(source.model)  # first of all: who must name the longest text need not learn later that it is in vain
    stated = architectures.longest_by_tables(source.model, getattr(config, "max_position_embeddings", None))
    rope.refuse_dynamic(source.model, max_cache or 0)
    stated = rope.original_length(source.model, rope.DYNAMIC) or stated
    longest = longest_text(source, stated, max_cache)
    variants = rope.variants(source.model, longest)
    progress("tracing the decoder")
    caches = tracing.cache_infos(source.model, variants)
    conformance.check_decoder(source.model, caches, variants)
    traced = tracing.trace_decoder(source.model, caches, aux_layers, variants)
    progress("writing graphs")
    graph.name_weights(traced)
    graph.save_graph(traced, folder / DECODER)
    info = graph.graph_info(traced, DECODER)
    model = _model_info(source, info, len(caches), longest, aux_layers)
    copy_tokenizer(source.path, folder / "tokenizer")
    progress("recording golden outputs")
    golden.write_golden(source.model, folder, model.vocab_size, model.max_cache)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=model,
        graphs={"decoder": info},
        generation=generation_rules(source.model, model.vocab_size),
        provenance=provenance(name, checkpoint.source_hashes(source.path)),
        weights=graph.weight_infos(folder / DECODER, "graphs"),
    )
    return manifest, golden.Reference(source.model)


def _write_assistant(
    source: Any, folder: Path, max_cache: int | None, aux_layers: tuple[int, ...], name: str, progress: Progress
) -> tuple[Manifest, Any]:
    return _write_encoder_decoder(source, folder, max_cache, aux_layers, name, progress, assistant=True)


def _write_encoder_decoder(
    source: Any,
    folder: Path,
    max_cache: int | None,
    aux_layers: tuple[int, ...],
    name: str,
    progress: Progress,
    assistant: bool = False,
) -> tuple[Manifest, Any]:
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
        states = golden.encoder_states(source.model, sources)
    copy_tokenizer(source.path, folder / "tokenizer")
    rules = generation_rules(source.model, model.vocab_size)
    progress("recording golden outputs")
    golden.write_golden(source.model, folder, model.vocab_size, model.max_cache, sources, states)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=model,
        graphs=graphs,
        generation=rules,
        provenance=provenance(name, checkpoint.source_hashes(source.path)),
        weights=graph.weight_infos(folder / DECODER, "graphs"),
    )
    if model.source == "audio":
        manifest = frontend.add_frontend(source.path, folder, manifest)
    return manifest, golden.Reference(source.model, sources)


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


def _recognised(heads: Sequence[str | Path]) -> list["RecognisedHead"]:
    """Before anything is traced: what a head reads decides what the target's graph returns, and wrong folders fail early."""
    from .heads.families import recognise

    return [recognise(Path(head)) for head in heads]


def _layers_read(source: Any, heads: Sequence["RecognisedHead"], aux_layers: Sequence[int]) -> tuple[int, ...]:
    """The layers asked for, then those that only the heads read."""
    if not heads:
        return tuple(aux_layers)
    from . import seq2seq, tracing
    from .heads.families import aux_layers as read_by

    caches = seq2seq.cache_infos(source.model)[0] if source.has_encoder else tracing.cache_infos(source.model)
    return tuple(dict.fromkeys((*aux_layers, *read_by(heads, len(caches)))))


def _add_heads(manifest: Manifest, folder: Path, heads: Sequence["RecognisedHead"], progress: Progress) -> Manifest:
    from .heads.families import add_head

    for head in heads:
        progress("adding heads")
        manifest = add_head(folder, manifest, head)
    return manifest

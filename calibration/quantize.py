"""Bundle to a smaller bundle: weights in 8 or 4 bits, the graphs still standard ONNX.

A quantized weight is a DequantizeLinear in front of the same MatMul: int8 with one scale per output channel, int4 with one
per group of inputs. What a device makes of that is its lowering's business, so one quantized bundle serves them all.
"""

import dataclasses
import datetime
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.exporter.comparison import all_logits, greedy_tokens
from headstart.exporter.float_agreement import agreement, forced_texts, warn_if_poor
from headstart.exporter.golden import GREEDY, Texts, read_golden, save_golden
from headstart.exporter.graph import graph_info, save_beside, save_graph, weight_infos
from headstart.exporter.passes.gemm import split_gemms
from headstart.exporter.passes.linear import Linear, embedding_tables, is_lm_head, linears
from headstart.exporter.passes.surgery import clean
from headstart.runtime.bundle import Bundle, Manifest, write_manifest
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.engines.ort_session import AS_WRITTEN, Provider
from headstart.runtime.errors import BundleError, OptionError, missing_extra
from headstart.runtime.output import new_folder
from headstart.runtime.precision import FloatAgreement

from .feeds import EncoderFeeds, Feeds, decoder_feeds
from .integers import cache_ranges, quantize_caches, quantize_inputs
from .passages import Passage, calibration_passages
from .quantized_heads import quantize_head
from .rotation import rotate_layers
from .rounded_nodes import replace_embedding, replace_linear
from .rounding import INT8, QuantizedWeight, WeightScheme, round_to_nearest

Progress = Callable[[str, int, int], None]  # what, done, of
Rounder = Callable[[Linear, WeightScheme], QuantizedWeight]
DECODER, ENCODER = "graphs/decoder.onnx", "graphs/encoder.onnx"
QUANTIZED = ("encoder", "decoder")  # graphs, in the order of computation
METHODS = ("rtn", "awq", "gptq", "smoothquant")
SCALING = ("awq", "smoothquant")  # methods that scale the inputs' channels
KEPT = ("weights", "method", "activations", "kv_cache", "lm_head", "embedding", "heads")  # options named in the manifest


@dataclass(frozen=True)
class QuantizeOptions:
    """What is stored how.

    Attributes:
        weights: of the linear layers inside the decoder: int8 or int4.
        group: inputs that share an int4 scale: 16, 32, 64 or 128. A layer whose inputs it does not divide takes the next
            smaller group that does, or 8 bits where none does; the manifest counts them (other_groups).
        method: rtn (each weight to its nearest value), awq, gptq or smoothquant (all three want calibration text).
        activations: what quantized layers inside the decoder read: dynamic (as the device likes, a scale per row on CPUs), or
            static (int8 with a fixed scale, as TensorRT needs; wants calibration text, and int8 weights).
        kv_cache: int8 (one scale per head; wants calibration text) or none.
        lm_head: int8 or none, whatever `weights` is: its errors go straight into the logits.
        embedding: int8 or none.
        heads: linear layers of the draft heads: int8 or none.
        calibration_tokens: of the text that is looked at, as the decoder reads them.
        rotation: what linear layers read is rotated first, so that no channel is far larger than the others (`rotate_layers`).
            None: with rtn and gptq; awq and smoothquant scale channels for the same end.
    """

    weights: str = "int8"
    group: int = 32
    method: str = "rtn"
    activations: str = "dynamic"
    kv_cache: str = "none"
    lm_head: str = "int8"
    embedding: str = "int8"
    heads: str = "int8"
    calibration_tokens: int = 8192
    rotation: bool | None = None

    def __post_init__(self) -> None:
        _one_of("--weights", self.weights, ("int8", "int4"))
        _one_of("--method", self.method, METHODS)
        _one_of("--activations", self.activations, ("dynamic", "static"))
        for name in ("kv_cache", "lm_head", "embedding", "heads"):
            _one_of(f"--{name.replace('_', '-')}", getattr(self, name), ("int8", "none"))
        WeightScheme(4, self.group)  # raises for an unknown group
        for option, value in (("--activations", "static"), ("--method", "smoothquant")):
            if self.weights != "int8" and value in (self.activations, self.method):
                raise OptionError(f"{option} {value} makes int8 products, with int8 weights only. Fix: --weights int8.")
        if self.rotation and self.method in SCALING:
            raise OptionError(
                f"--rotation and --method {self.method} both even out the channels of inputs, and a rotated channel has "
                "no scale of its own. Fix: --method rtn or gptq, or --no-rotation."
            )
        if self.calibration_tokens < 256:
            raise OptionError(f"--calibration-tokens {self.calibration_tokens} is too few: at least 256 are needed.")

    @property
    def scheme(self) -> WeightScheme:
        return INT8 if self.weights == "int8" else WeightScheme(4, self.group)

    @property
    def rotates(self) -> bool:
        return self.method not in SCALING if self.rotation is None else self.rotation

    @property
    def calibrated(self) -> bool:
        """Something is measured on text."""
        return self.method != "rtn" or self.activations == "static" or self.kv_cache != "none"

    def described(self) -> dict[str, str]:
        """For the manifest."""
        parts = {name: getattr(self, name) for name in KEPT}
        parts |= {"group": str(self.group)} if self.weights == "int4" else {}
        return parts | ({"rotation": "block-hadamard"} if self.rotates else {})


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{option} {value!r} is unknown. Choose one of: {', '.join(known)}.")


def quantize(
    bundle: str | Path,
    output: str | Path,
    options: QuantizeOptions | None = None,
    data: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, of: None,
) -> Bundle:
    """Write a quantized copy of `bundle` to `output`.

    Args:
        data: text or JSONL file; on it is measured what layers read and caches hold. Of a model with an encoder each line is a
            source ("prompt", or "audio": a sound file beside it) with its "target" (of audio also "text"); where there is
            none, the decoder reads the bundle's own greedy output. Sources longer than it reads at once are left out.

    Raises:
        BundleError: no bundle, or one that is quantized already.
        OptionError: a method without data, data too small, an assistant with anything that is measured.
        PromptError, AudioError: an encoder's sources that cannot be read.
        OutputError: `output` exists. Nothing is left there after any error.
    """
    options = options or QuantizeOptions()
    opened = Bundle.load(bundle)
    _check(opened, options, data)
    with new_folder(Path(output), force) as folder:
        try:
            manifest = _write(opened, folder, options, data, progress)
        except ModuleNotFoundError as error:
            raise missing_extra(error, "Quantizing") from error
        write_manifest(folder, manifest)
    return Bundle.load(output, check_hashes=False)


def _check(bundle: Bundle, options: QuantizeOptions, data: str | Path | None) -> None:
    done = bundle.manifest.quantization
    if done:
        raise BundleError(
            f"{bundle.path} is quantized already ({done.get('weights')}, {done.get('method')}); doing it twice adds the errors "
            "up. Fix: start from the float32 bundle."
        )
    if bundle.manifest.model.dtype != "float32":
        raise BundleError(f"{bundle.path} is {bundle.manifest.model.dtype}; quantization starts from float32 weights.")
    if options.calibrated and bundle.manifest.model.source == "states":
        raise OptionError(
            f"{bundle.path} is an assistant: what it reads are the states of its target's encoder, which no data file holds. "
            "Fix: --method rtn, without --activations static and --kv-cache int8."
        )
    if options.calibrated and data is None:
        raise OptionError(
            "awq, gptq, smoothquant, static activations and an int8 cache are measured on text. "
            "Fix: --data FILE, or --method rtn alone."
        )


def _write(bundle: Bundle, folder: Path, options: QuantizeOptions, data: str | Path | None, progress: Progress) -> Manifest:
    import onnx_ir as ir

    shutil.copytree(bundle.path / "tokenizer", folder / "tokenizer")
    graphs = dict(bundle.manifest.graphs)
    models = {name: split_gemms(ir.load(bundle.path / graphs[name].file))[0] for name in QUANTIZED if name in graphs}
    wanted = options.calibrated and data is not None
    passages = calibration_passages(bundle, Path(str(data)), options.calibration_tokens) if wanted else ()
    decoder, encoder = models["decoder"], models.get("encoder")
    _quantize_graphs(bundle, decoder, encoder, options, passages, progress)
    save_graph(decoder, folder / DECODER)
    graphs["decoder"] = graph_info(decoder, DECODER)
    if encoder is not None:  # beside the decoder: tables they share lie there
        save_beside(encoder, folder / ENCODER, folder / DECODER)
        graphs["encoder"] = graph_info(encoder, ENCODER)
    if "frontend" in graphs:  # a Fourier transform, whose precision everything behind it rests on
        save_graph(ir.load(bundle.path / graphs["frontend"].file), folder / graphs["frontend"].file)
    manifest = dataclasses.replace(
        bundle.manifest,
        graphs=graphs,
        weights=weight_infos(folder / DECODER, "graphs"),
        quantization=options.described()
        | _other_groups(folder, bundle.manifest.model.vocab_size, options)
        | {"date": datetime.date.today().isoformat()},
    )
    for done, name in enumerate(manifest.heads):
        quantize_head(bundle, name, folder, manifest, options.heads == "int8")
        progress("heads", done + 1, len(manifest.heads))
    found = _write_golden(Bundle(folder, manifest), read_golden(bundle))
    return dataclasses.replace(manifest, quantization=manifest.quantization | {"greedy_agreement": f"{found.greedy:.3f}"})


def _quantize_graphs(
    bundle: Bundle, decoder: Any, encoder: Any, options: QuantizeOptions, passages: Sequence[Passage], progress: Progress
) -> None:
    """Both graphs in place, the decoder measured with the quantized encoder's states."""
    slots, vocab_size = bundle.manifest.graphs["decoder"].slots, bundle.manifest.model.vocab_size
    if options.rotates:
        tied = rotate_layers(decoder, vocab_size, options.lm_head == "int8")
        if encoder is not None:
            rotate_layers(encoder, vocab_size, options.lm_head == "int8", tied)
    if encoder is not None:
        _quantize_layers(encoder, vocab_size, options, EncoderFeeds(bundle, passages) if passages else None, progress)
    with decoder_feeds(bundle, passages, encoder) if passages else nullcontext() as feeds:
        ranges = cache_ranges(decoder, slots, feeds) if feeds is not None and options.kv_cache == "int8" else {}
        _quantize_layers(decoder, vocab_size, options, feeds, progress)
    if ranges:
        quantize_caches(decoder, slots, ranges)


def _quantize_layers(model: Any, vocab_size: int, options: QuantizeOptions, feeds: Feeds | None, progress: Progress) -> None:
    """The weights of one graph, and what its inner layers read where that is to be int8. `feeds`: None measures nothing."""
    quantize_graph(model, vocab_size, options, _rounder(model, vocab_size, options, feeds, progress), progress)
    if feeds is not None and options.activations == "static":
        quantize_inputs(model, [linear for linear in linears(model) if not is_lm_head(linear, vocab_size)], feeds)


def _other_groups(folder: Path, vocab_size: int, options: QuantizeOptions) -> dict[str, str]:
    """For the manifest: how many int4 layers took smaller groups, or 8 bits, because --group does not divide their inputs."""
    import onnx_ir as ir

    files = [folder / name for name in (DECODER, ENCODER) if (folder / name).is_file()]
    found = [linear for file in files for linear in linears(ir.load(file)) if not is_lm_head(linear, vocab_size)]
    schemes = Counter(options.scheme.fitting(linear.shape[0]) for linear in found)
    del schemes[options.scheme]
    names = [f"{count} of {scheme.group or 'int8'}" for scheme, count in sorted(schemes.items(), key=lambda one: -one[0].group)]
    return {"other_groups": ", ".join(names)} if names else {}


def _rounder(model: Any, vocab_size: int, options: QuantizeOptions, feeds: Feeds | None, progress: Progress) -> Rounder:
    if feeds is None or options.method == "rtn":
        return lambda linear, scheme: round_to_nearest(linear.dequantized(), scheme)
    from .methods import CalibratedRounder

    return CalibratedRounder(model, vocab_size, options.method, feeds, progress)


def quantize_graph(model: Any, vocab_size: int, options: QuantizeOptions, rounder: Rounder, progress: Progress) -> None:
    """Replace every linear layer's weight, and the embedding's table, in place."""
    found = list(linears(model))
    for done, linear in enumerate(found):
        if not is_lm_head(linear, vocab_size):
            replace_linear(model, linear, rounder(linear, options.scheme.fitting(linear.shape[0])))
        elif options.lm_head == "int8":
            replace_linear(model, linear, round_to_nearest(linear.dequantized(), INT8))
        progress("weights", done + 1, len(found))
    if options.embedding == "int8":
        for gather, table in embedding_tables(model, vocab_size):
            replace_embedding(model, gather, table)
    clean(model)


def _write_golden(bundle: Bundle, golden: dict[str, NDArray[Any]]) -> FloatAgreement:
    """Record the quantized canonical graph's outputs on the golden inputs, keep the float model's, and compare the two.

    Warns where quantized weights do not represent the model.
    """
    model = bundle.manifest.model
    engine = OnnxRuntimeEngine(bundle, provider=Provider(entries=AS_WRITTEN))
    texts = Texts(golden["input_ids"], golden.get("sources"))
    tokens = min(GREEDY, model.max_cache - texts.input_ids.shape[1])
    logits = np.stack([all_logits(engine, ids, source) for ids, source in texts.pairs()])
    greedy = np.stack([greedy_tokens(engine, ids.tolist(), tokens, source) for ids, source in texts.pairs()])
    save_golden(bundle.path, texts.input_ids, logits, greedy, texts.sources, float_model=golden)
    forced = Texts(forced_texts(texts.input_ids, golden), texts.sources)
    found = agreement(np.stack([all_logits(engine, ids, source) for ids, source in forced.pairs()]), golden)
    warn_if_poor(bundle.manifest.quantization["weights"], found)
    return found

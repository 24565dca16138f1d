"""Golden outputs: what the checkpoint itself says on a few inputs, recorded in the bundle.

They let a device without torch prove that its engine still computes the exported model. Inputs are seeded random
tokens, since every vocabulary has those. Recorded by transformers' own attention, not by ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.bundle import GOLDEN, Bundle
from headstart.runtime.errors import BundleError, CheckpointError

from .generation_rules import one_token

SEQUENCES = 3
LENGTH = 24  # tokens
TOP = 64  # logits kept per row: a whole vocabulary of every row would outweigh small models
GREEDY = 32  # tokens generated from each sequence
OUTPUTS = ("top_ids", "top_logits", "spread", "greedy")  # of the model itself, in the file
FLOAT = "float_"  # before the names of the float model's, in the file of a quantized bundle


@dataclass(frozen=True)
class Texts:
    """Decoder inputs [N, T], and what the encoder reads beside each when the model has one."""

    input_ids: NDArray[np.int64]
    sources: NDArray[Any] | None

    def pairs(self) -> list[tuple[NDArray[np.int64], NDArray[Any] | None]]:
        sources = [None] * len(self.input_ids) if self.sources is None else self.sources
        return list(zip(self.input_ids, sources, strict=True))


@dataclass(frozen=True)
class Reference:
    """What the checkpoint computes, run by transformers' own attention; text N belongs to source N where there are any."""

    model: Any
    sources: NDArray[Any] | None = None

    def logits(self, text: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[T, V] of [T] tokens."""
        logits: NDArray[np.float32] = reference_logits(self.model, token_ids[None], self._source(text))[0]
        return logits

    def hidden(self, text: int, token_ids: NDArray[np.int64], layers: tuple[int, ...]) -> NDArray[np.float32]:
        """[T, n * H] of [T] tokens: `hidden_states` of those layers."""
        states: NDArray[np.float32] = reference_hidden(self.model, token_ids[None], layers, self._source(text))[0]
        return states

    def encoded(self, text: int) -> NDArray[np.float32]:
        """[E, H], what the encoder makes of the source."""
        states: NDArray[np.float32] = encoder_states(self.model, self._source(text))[0]
        return states

    def _source(self, text: int) -> NDArray[Any] | None:
        return None if self.sources is None else self.sources[text : text + 1]


def read_golden(bundle: Bundle) -> dict[str, NDArray[Any]]:
    """The arrays of `golden.npz`, see `write_golden`. Raises BundleError when it is missing."""
    file = bundle.path / GOLDEN
    if not file.is_file():
        raise BundleError(f"{file} is missing. Fix: export the bundle again.")
    with np.load(file) as arrays:
        return dict(arrays)


def write_golden(
    model: Any,
    folder: Path,
    vocab_size: int,
    max_cache: int,
    sources: NDArray[Any] | None = None,
    states: NDArray[Any] | None = None,
) -> None:
    """`golden.npz`: input_ids [N, T], top_ids and top_logits [N, T, 64], spread [N, T] (max - min), greedy [N, 32].

    With an encoder also its sources [N, …]; input_ids are then the decoder's, and begin with its start token. An assistant
    is given the encoder's `states` of the sources, and its golden file holds them instead.
    """
    input_ids = golden_inputs(vocab_size, max_cache)
    if sources is not None:
        input_ids[:, 0] = decoder_start(model)
    without_padding(model, input_ids)
    greedy = reference_greedy(model, input_ids, min(GREEDY, max_cache - input_ids.shape[1]), sources)
    save_golden(folder, input_ids, reference_logits(model, input_ids, sources), greedy, sources if states is None else states)


def golden_inputs(vocab_size: int, longest: int, seed: int = 0) -> NDArray[np.int64]:
    """[N, T] seeded random tokens."""
    return np.random.default_rng(seed).integers(0, vocab_size, (SEQUENCES, min(LENGTH, longest // 2)))


def without_padding(model: Any, input_ids: NDArray[np.int64]) -> None:
    """Replace padding, in place, where the model may not count it: positions are then no function of the length alone."""
    from .architectures import shifted_embeddings

    if model.config.is_encoder_decoder or shifted_embeddings(model):
        for padding in {model.generation_config.pad_token_id, model.config.get_text_config().pad_token_id} - {None}:
            input_ids[input_ids == padding] = decoder_start(model) if model.config.is_encoder_decoder else (padding + 1)


def golden_features(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """[N, *shape] seeded noise, of the loudness of speech features."""
    return (0.5 * np.random.default_rng(1).standard_normal((SEQUENCES, *shape))).astype(np.float32)


def decoder_start(model: Any) -> int:
    """The token an encoder-decoder's output begins with."""
    settings = model.generation_config
    stated = settings.decoder_start_token_id if settings.decoder_start_token_id is not None else settings.bos_token_id
    start = one_token(stated)
    if start is None:
        raise CheckpointError(
            "The checkpoint names neither decoder_start_token_id nor bos_token_id: its decoder has no token to start from. "
            "Fix: add decoder_start_token_id to generation_config.json."
        )
    return start


def save_golden(
    folder: Path,
    input_ids: NDArray[np.int64],
    logits: NDArray[np.float32],
    greedy: NDArray[np.int64],
    sources: NDArray[Any] | None = None,
    float_model: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Write the file from [N, T] inputs, [N, T, V] logits over them, and the [N, tokens] that follow greedily.

    `float_model`: of a quantized bundle, the golden outputs of the float one, which are kept under names of their own.
    """
    top = np.argsort(-logits, axis=-1, kind="stable")[..., :TOP]
    read: dict[str, Any] = {} if sources is None else {"sources": sources}
    if float_model is not None:
        read |= {f"{FLOAT}{name}": float_model[name] for name in OUTPUTS}
    np.savez_compressed(
        folder / GOLDEN,
        input_ids=input_ids,
        top_ids=top.astype(np.int32),
        top_logits=np.take_along_axis(logits, top, axis=-1),
        spread=logits.max(axis=-1) - logits.min(axis=-1),
        greedy=greedy,
        **read,
    )


def float_reference(golden: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]] | None:
    """OUTPUTS of the float model, from a quantized bundle's golden arrays; None in a bundle that is not quantized."""
    if f"{FLOAT}greedy" not in golden:
        return None
    return {name: golden[f"{FLOAT}{name}"] for name in OUTPUTS}


def reference_logits(model: Any, input_ids: NDArray[np.int64], sources: NDArray[Any] | None = None) -> NDArray[np.float32]:
    """[N, T, V] float32 of the checkpoint in torch: each row as of the tokens up to it."""
    return _of_prefixes(model, input_ids, lambda ids: _forward(model, ids, sources).logits)


def reference_hidden(
    model: Any, input_ids: NDArray[np.int64], layers: tuple[int, ...], sources: NDArray[Any] | None = None
) -> NDArray[np.float32]:
    """[N, T, n * H] float32: `hidden_states` of those layers, as `reference_logits`."""
    import torch

    def joined(ids: Any) -> Any:
        out = _forward(model, ids, sources, output_hidden_states=True)
        states = out.hidden_states if sources is None else out.decoder_hidden_states
        return torch.cat([states[layer] for layer in layers], dim=-1)

    return _of_prefixes(model, input_ids, joined)


def _of_prefixes(model: Any, input_ids: NDArray[np.int64], run: Callable[[Any], Any]) -> NDArray[np.float32]:
    """[N, T, …] of `run`; where rotary frequencies change with the length, rows before the change are of a shorter forward."""
    import torch

    from .rope import LONGROPE, original_length

    ids = torch.from_numpy(input_ids)
    original = original_length(model, LONGROPE)
    with torch.no_grad():
        rows = run(ids)
        if original is not None and original < ids.shape[1]:
            rows = torch.cat([run(ids[:, :original]), rows[:, original:]], dim=1)
    return np.asarray(rows.float().numpy())


def _forward(model: Any, ids: Any, sources: NDArray[Any] | None, output_hidden_states: bool = False) -> Any:
    read = {"input_ids": ids} if sources is None else _source_inputs(model, sources) | {"decoder_input_ids": ids}
    return model(**read, use_cache=False, output_hidden_states=output_hidden_states)


def encoder_states(model: Any, sources: NDArray[Any] | None) -> NDArray[np.float32]:
    """[N, E, H] that the encoder makes of sources without padding."""
    import torch

    assert sources is not None, "a model with an encoder reads sources"
    with torch.no_grad():
        states = model.get_encoder()(**_source_inputs(model, sources)).last_hidden_state
    return np.asarray(states.float().numpy())


def _source_inputs(model: Any, sources: NDArray[Any]) -> dict[str, Any]:
    import torch

    source = torch.from_numpy(sources)
    name = model.get_encoder().main_input_name
    return {name: source, "attention_mask": torch.ones_like(source)} if name == "input_ids" else {name: source.to(model.dtype)}


def reference_greedy(
    model: Any, input_ids: NDArray[np.int64], tokens: int, sources: NDArray[Any] | None = None
) -> NDArray[np.int64]:
    """[N, tokens] int64 from `transformers.generate`, plain greedy: no end token and no logit rules."""
    import torch
    from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, GenerationMixin

    from .architectures import shifted_embeddings
    from .rope import LONGROPE, original_length

    plain = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = torch.from_numpy(input_ids)
    read = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for _, shift in shifted_embeddings(model)[:1]:  # generate() would count from 0, unlike the model's own forward
        read["position_ids"] = torch.arange(shift, shift + ids.shape[1]).expand_as(ids)
    crosses = (original_length(model, LONGROPE) or ids.shape[1] + tokens) < ids.shape[1] + tokens
    if crosses or (sources is None and hasattr(model.config, "encoder_layers")):
        # A cache would keep keys of LongRoPE's short factors; a decoder's alone would have as many layers as its encoder had.
        plain.use_cache = False
    if sources is not None:
        plain.decoder_start_token_id = decoder_start(model)
        # generate() would make a cache of as many layers as some encoders have, whatever the decoder has.
        caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
        read = _source_inputs(model, sources) | {"decoder_input_ids": ids, "past_key_values": caches}
    kept, model.generation_config = model.generation_config, plain  # generate() would mix its defaults in
    try:
        out = GenerationMixin.generate(model, **read, generation_config=plain)  # not Whisper's own, which adds rules
    finally:
        model.generation_config = kept
    return np.asarray(out[:, ids.shape[1] :].numpy())

"""Golden outputs: what the checkpoint itself says on a few inputs, recorded in the bundle.

They let a device without torch prove that its engine still computes the exported model. Inputs are seeded random
tokens, since every vocabulary has those. Recorded by transformers' own attention, not by ours.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.bundle import GOLDEN, Bundle
from headstart.runtime.errors import BundleError, CheckpointError

SEQUENCES = 3
LENGTH = 24  # tokens
TOP = 64  # logits kept per row: a whole vocabulary of every row would outweigh small models
GREEDY = 32  # tokens generated from each sequence


@dataclass(frozen=True)
class Texts:
    """Decoder inputs [N, T], and what the encoder reads beside each when the model has one."""

    input_ids: NDArray[np.int64]
    sources: NDArray[Any] | None

    def pairs(self) -> list[tuple[NDArray[np.int64], NDArray[Any] | None]]:
        sources = [None] * len(self.input_ids) if self.sources is None else self.sources
        return list(zip(self.input_ids, sources, strict=True))


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
        start = decoder_start(model)
        input_ids[:, 0] = start
        input_ids[input_ids == model.generation_config.pad_token_id] = start  # some decoders do not count padding
    greedy = reference_greedy(model, input_ids, min(GREEDY, max_cache - input_ids.shape[1]), sources)
    save_golden(folder, input_ids, reference_logits(model, input_ids, sources), greedy, sources if states is None else states)


def golden_inputs(vocab_size: int, longest: int, seed: int = 0) -> NDArray[np.int64]:
    """[N, T] seeded random tokens."""
    return np.random.default_rng(seed).integers(0, vocab_size, (SEQUENCES, min(LENGTH, longest // 2)))


def golden_features(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """[N, *shape] seeded noise, of the loudness of speech features."""
    return (0.5 * np.random.default_rng(1).standard_normal((SEQUENCES, *shape))).astype(np.float32)


def decoder_start(model: Any) -> int:
    """The token an encoder-decoder's output begins with."""
    settings = model.generation_config
    start = settings.decoder_start_token_id if settings.decoder_start_token_id is not None else settings.bos_token_id
    if start is None:
        raise CheckpointError(
            "The checkpoint names neither decoder_start_token_id nor bos_token_id: its decoder has no token to start from. "
            "Fix: add decoder_start_token_id to generation_config.json."
        )
    return int(start)


def save_golden(
    folder: Path,
    input_ids: NDArray[np.int64],
    logits: NDArray[np.float32],
    greedy: NDArray[np.int64],
    sources: NDArray[Any] | None = None,
) -> None:
    """Write the file from [N, T] inputs, [N, T, V] logits over them, and the [N, tokens] that follow greedily."""
    top = np.argsort(-logits, axis=-1, kind="stable")[..., :TOP]
    read: dict[str, Any] = {} if sources is None else {"sources": sources}
    np.savez_compressed(
        folder / GOLDEN,
        input_ids=input_ids,
        top_ids=top.astype(np.int32),
        top_logits=np.take_along_axis(logits, top, axis=-1),
        spread=logits.max(axis=-1) - logits.min(axis=-1),
        greedy=greedy,
        **read,
    )


def reference_logits(model: Any, input_ids: NDArray[np.int64], sources: NDArray[Any] | None = None) -> NDArray[np.float32]:
    """[N, T, V] float32 of the checkpoint in torch."""
    import torch

    ids = torch.from_numpy(input_ids)
    read = {"input_ids": ids} if sources is None else _source_inputs(model, sources) | {"decoder_input_ids": ids}
    with torch.no_grad():
        logits = model(**read, use_cache=False).logits
    return np.asarray(logits.float().numpy())


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

    plain = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = torch.from_numpy(input_ids)
    read = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
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

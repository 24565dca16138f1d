"""Golden outputs: what the checkpoint itself says on a few inputs, recorded in the bundle.

They let a device without torch prove that its engine still computes the exported model. Inputs are seeded random
tokens, since every vocabulary has those. Recorded by transformers' own attention, not by ours.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.bundle import GOLDEN

SEQUENCES = 3
LENGTH = 24  # tokens
TOP = 64  # logits kept per row: a whole vocabulary of every row would outweigh small models
GREEDY = 32  # tokens generated from each sequence


def write_golden(model: Any, folder: Path, vocab_size: int, max_cache: int) -> None:
    """`golden.npz`: input_ids [N, T], top_ids and top_logits [N, T, 64], spread [N, T] (max - min), greedy [N, 32]."""
    input_ids = golden_inputs(vocab_size, max_cache)
    greedy = reference_greedy(model, input_ids, min(GREEDY, max_cache - input_ids.shape[1]))
    save_golden(folder, input_ids, reference_logits(model, input_ids), greedy)


def golden_inputs(vocab_size: int, max_cache: int) -> NDArray[np.int64]:
    """[N, T] seeded random tokens."""
    return np.random.default_rng(0).integers(0, vocab_size, (SEQUENCES, min(LENGTH, max_cache // 2)))


def save_golden(folder: Path, input_ids: NDArray[np.int64], logits: NDArray[np.float32], greedy: NDArray[np.int64]) -> None:
    """Write the file from [N, T] inputs, [N, T, V] logits over them, and the [N, tokens] that follow greedily."""
    top = np.argsort(-logits, axis=-1, kind="stable")[..., :TOP]
    np.savez_compressed(
        folder / GOLDEN,
        input_ids=input_ids,
        top_ids=top.astype(np.int32),
        top_logits=np.take_along_axis(logits, top, axis=-1),
        spread=logits.max(axis=-1) - logits.min(axis=-1),
        greedy=greedy,
    )


def reference_logits(model: Any, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """[N, T, V] float32 of the checkpoint in torch."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(input_ids), use_cache=False).logits
    return np.asarray(logits.float().numpy())


def reference_greedy(model: Any, input_ids: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """[N, tokens] int64 from `transformers.generate`, plain greedy: no end token and no logit rules."""
    import torch
    from transformers import GenerationConfig

    plain = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = torch.from_numpy(input_ids)
    kept, model.generation_config = model.generation_config, plain  # generate() would mix its defaults in
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
    finally:
        model.generation_config = kept
    return np.asarray(out[:, ids.shape[1] :].numpy())

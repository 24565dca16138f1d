"""Rotary frequencies that depend on the text's length: each row is that of transformers on the row's own prefix."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from architectures import GATED, LENGTH_DEPENDENT, save_checkpoint, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.exporter.build import build
from headstart.exporter.comparison import all_logits
from headstart.exporter.export import export
from headstart.exporter.golden import reference_logits
from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import OptionError
from headstart.runtime.loading import load
from headstart.runtime.prefill import last_logits, open_state, prefill

BundleOf = Callable[[str], Bundle]
CheckpointOf = Callable[[str], Path]
TEXTS = ["abcabcabcabcabcabcabcab", "a text of other letters, longer than 32 tokens", "short"]  # before, beyond, and before 32


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_every_row_is_that_of_its_own_prefix(name: str, bundle_of: BundleOf) -> None:
    """Whether the text is read at once or in chunks that do not end at the original length."""
    model, engine = tiny_model(name), OnnxRuntimeEngine(bundle_of(name))
    ids = np.random.default_rng(5).integers(3, 300, 48)
    wanted = np.stack([reference_logits(model, ids[None, : length + 1])[0, -1] for length in range(len(ids))])
    assert np.abs(all_logits(engine, ids) - wanted).max() <= 1e-4 * np.ptp(wanted)
    state = open_state(engine, 64)
    for begin, end in ((0, 20), (20, 40), (40, 48)):
        last = last_logits(prefill(engine, state, ids[begin:end].tolist()))
        assert np.abs(last - wanted[end - 1]).max() <= 1e-4 * np.ptp(wanted)


@pytest.mark.parametrize("built", [False, True])
def test_drafts_and_batches_across_the_original_length(built: bool, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    """Equal to plain decoding of each text alone, and to transformers without a cache; on the CPU's own build too."""
    bundle = export(checkpoint_of("phi3_longrope"), tmp_path / "bundle", max_cache=96)
    if built:
        build(bundle.path)
    model = load(bundle.path)
    options = {"max_new_tokens": 24, "ignore_end": True}
    plain = [model.generate(text, drafter="none", **options).token_ids for text in TEXTS]
    assert [model.generate(text, drafter="ngram", draft_nodes=12, **options).token_ids for text in TEXTS] == plain
    assert [result.token_ids for result in model.generate(TEXTS, drafter="none", **options)] == plain
    prompt = model.tokenizer.encode(TEXTS[0])
    for count, token in enumerate(plain[0]):
        text = np.array([prompt + plain[0][:count]])
        assert int(reference_logits(tiny_model("phi3_longrope"), text)[0, -1].argmax()) == token


def test_one_variant_where_no_text_crosses(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    both, one = (export(checkpoint_of("llama_longrope"), tmp_path / str(longest), max_cache=longest) for longest in (96, 32))
    assert _kv_heads(both) == 2 * _kv_heads(one)
    assert "--max-cache 32" in both.manifest.provenance.notes[0] and not one.manifest.provenance.notes


def _kv_heads(bundle: Bundle) -> int:
    return bundle.manifest.graphs["decoder"].slots[0].kv_heads


def test_dynamic_scaling_within_its_original_length_alone(tmp_path: Path) -> None:
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}
    model = LlamaForCausalLM(LlamaConfig(**{**GATED, "max_position_embeddings": 48, "rope_parameters": rope}))
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    with pytest.raises(OptionError, match=r"rope_type dynamic .* beyond 48 tokens.* --max-cache 48"):
        export(checkpoint, tmp_path / "bundle", max_cache=96)
    assert not (tmp_path / "bundle").exists()
    assert export(checkpoint, tmp_path / "bundle").manifest.model.max_cache == 48

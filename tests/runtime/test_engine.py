"""The ONNX Runtime engine: how many rows stand beside a row changes nothing, and what it refuses."""

from collections.abc import Callable

import numpy as np
import pytest

from headstart.runtime.bundle import Bundle
from headstart.runtime.engines.onnxruntime import OnnxRuntimeEngine
from headstart.runtime.errors import EngineError, OptionError
from headstart.runtime.model import load
from headstart.runtime.prefill import prefill

BundleOf = Callable[[str], Bundle]


def test_chain_rows_are_bit_equal_to_single_steps(bundle_of: BundleOf) -> None:
    engine = OnnxRuntimeEngine(bundle_of("llama"))
    prompt, chain = [5, 6, 7, 8], [9, 10, 11, 12, 13]
    stepwise = engine.new_cache(1, 64)
    prefill(engine, stepwise, prompt)
    singles = [prefill(engine, stepwise, [token]).logits[0, 0].copy() for token in chain]
    at_once = engine.new_cache(1, 64)
    prefill(engine, at_once, prompt)
    rows = np.arange(len(chain))[None]
    output = engine.forward(at_once, np.array([chain]), len(prompt) + rows, np.tri(len(chain), dtype=np.bool_)[None], rows)
    assert (output.logits[0] == np.stack(singles)).all()


def test_aux_hidden_are_the_layers_asked_for(bundle_of: BundleOf, tmp_path: object) -> None:
    import torch
    from architectures import save_checkpoint, tiny_model

    from headstart.exporter.export import export

    folder = str(tmp_path)
    model = tiny_model("qwen3")
    save_checkpoint(model, f"{folder}/checkpoint")  # type: ignore[arg-type]
    engine = OnnxRuntimeEngine(export(f"{folder}/checkpoint", f"{folder}/bundle", aux_layers=(0, 1)))
    ids = np.array([[7, 8, 9]])
    rows = np.arange(3)[None]
    output = engine.forward(engine.new_cache(1, 8), ids, rows, np.tri(3, dtype=np.bool_)[None], rows)
    with torch.no_grad():
        states = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    wanted = torch.cat(states[:2], -1).numpy()
    assert output.aux_hidden is not None
    np.testing.assert_allclose(output.aux_hidden, wanted, rtol=1e-4, atol=1e-4)


def test_too_old_onnxruntime_is_refused(bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    with pytest.raises(EngineError, match=r"1\.23\.2 is too old"):
        OnnxRuntimeEngine(bundle_of("llama"))


def test_unknown_device(bundle_of: BundleOf) -> None:
    with pytest.raises(OptionError, match="device 'tpu' is unknown"):
        load(bundle_of("llama").path, device="tpu")

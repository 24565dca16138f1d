"""The ONNX Runtime engine: how many rows stand beside a row changes nothing, and what it refuses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from headstart.calibration.verification.reference import Reference
from headstart.runtime.bundle import Bundle
from headstart.runtime.contract import AUX_HIDDEN, LOGITS
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.engines.ort_host import HostGraph
from headstart.runtime.errors import EngineError, OptionError
from headstart.runtime.loading import load
from headstart.runtime.prefill import last_logits, prefill, run_decoder

BundleOf = Callable[[str], Bundle]


def test_chain_rows_are_bit_equal_to_single_steps(bundle_of: BundleOf) -> None:
    engine = OnnxRuntimeEngine(bundle_of("llama"))
    prompt, chain = [5, 6, 7, 8], [9, 10, 11, 12, 13]
    stepwise = engine.graph("decoder").new_state(1, 64)
    prefill(engine, stepwise, prompt)
    singles = [last_logits(prefill(engine, stepwise, [token])) for token in chain]
    at_once = engine.graph("decoder").new_state(1, 64)
    prefill(engine, at_once, prompt)
    rows = np.arange(len(chain))[None]
    output = run_decoder(engine, at_once, np.array([chain]), len(prompt) + rows, np.tri(len(chain), dtype=np.bool_)[None], rows)
    assert (output[LOGITS][0] == np.stack(singles)).all()


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
    output = run_decoder(engine, engine.graph("decoder").new_state(1, 8), ids, rows, np.tri(3, dtype=np.bool_)[None], rows)
    with torch.no_grad():
        states = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    wanted = torch.cat(states[:2], -1).numpy()
    assert output[AUX_HIDDEN] is not None
    np.testing.assert_allclose(output[AUX_HIDDEN], wanted, rtol=1e-4, atol=1e-4)


def test_too_old_onnxruntime_is_refused(bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    with pytest.raises(EngineError, match=r"1\.23\.2 is too old"):
        OnnxRuntimeEngine(bundle_of("llama"))


def test_unknown_device(bundle_of: BundleOf) -> None:
    with pytest.raises(OptionError, match="device 'tpu' is unknown"):
        load(bundle_of("llama").path, device="tpu")


def test_unknown_graphs_and_inputs_are_refused_by_name(bundle_of: BundleOf) -> None:
    engine = OnnxRuntimeEngine(bundle_of("llama"))
    with pytest.raises(EngineError, match=r"has no graph 'heads/eagle'\. It has: decoder\."):
        engine.graph("heads/eagle")
    decoder = engine.graph("decoder")
    with pytest.raises(EngineError, match="'output_rows' is missing or unknown: the graph takes input_ids, output_rows"):
        decoder.run(
            {"input_ids": np.zeros((1, 2), np.int64), "position_ids": np.zeros((1, 2), np.int64)}, decoder.new_state(1, 8)
        )


def test_every_shape_of_outputs_is_a_view_of_one_buffer(bundle_of: BundleOf) -> None:
    """Logits of 64 rows and a vocabulary of 128,000 are 33 MB: not once more for each number of rows and each state."""
    engine = OnnxRuntimeEngine(bundle_of("llama"))
    graph = engine.graph("decoder")
    assert isinstance(graph, HostGraph)
    model = engine.model
    for _ in range(2):
        state = graph.new_state(1, 128)
        for rows in (64, 2, 7, 33, 64, 1):
            places = np.arange(rows)[None]
            run_decoder(engine, state, places + 5, places, np.tri(rows, dtype=np.bool_)[None], places)
    assert graph._arena.nbytes == 4 * 64 * (model.vocab_size + model.hidden_size)


def test_outputs_of_one_shape_survive_a_growing_arena(bundle_of: BundleOf) -> None:
    """A pass of few rows, then of many, which takes a new buffer, then of few again: each returns its own numbers."""
    engine = OnnxRuntimeEngine(bundle_of("llama"))
    state, found = engine.graph("decoder").new_state(1, 128), []
    for rows in (3, 40, 3):
        places = np.arange(rows)[None]
        output = run_decoder(engine, state, places + 5, places, np.tri(rows, dtype=np.bool_)[None], places)
        found.append(output.rows(LOGITS, 0, [2, -1]))
        assert (found[-1][0] == output[LOGITS][0, 2]).all() and (found[-1][1] == output[LOGITS][0, rows - 1]).all()
    np.testing.assert_array_equal(found[0], found[2])


def test_only_what_decodes_stays_awake_between_passes(bundle_of: BundleOf) -> None:
    """Threads that spin after a pass take the cores of whatever runs next: an encoder's rest."""
    engine = OnnxRuntimeEngine(bundle_of("t5"), threads=2)
    engine.encode([np.arange(3, 9)])
    assert _resting(engine) == {"decoder": False, "encoder": True}


def test_the_reference_of_verify_is_computed_as_written_and_rests(bundle_of: BundleOf) -> None:
    """It runs in turn with the engine that is compared with it."""
    engine = Reference.open(bundle_of("t5"), threads=2).engine
    assert isinstance(engine, OnnxRuntimeEngine)
    engine.encode([np.arange(3, 9)])
    assert _resting(engine) == {"decoder": True, "encoder": True}
    entries = [
        one.session.get_session_options().get_session_config_entry("session.disable_quant_qdq")
        for one in engine._opened.values()
    ]
    assert entries == ["1", "1"]


def _resting(engine: OnnxRuntimeEngine) -> dict[str, bool]:
    return {name: _rests(one.session) for name, one in engine._opened.items()}


def _rests(session: Any) -> bool:
    try:
        return session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"
    except RuntimeError:  # ONNX Runtime's answer where it is not set
        return False

"""Every architecture, exported, against transformers: logits of each row, 32 greedy tokens, and trees against paths."""

from collections.abc import Callable

import numpy as np
import pytest
from architectures import ARCHITECTURES, LENGTH_DEPENDENT, SELF_POSITIONED, tiny_model
from trees import random_tree

from headstart.calibration.verification.logits import check_golden
from headstart.exporter.comparison import all_logits
from headstart.exporter.golden import read_golden, reference_greedy, reference_logits
from headstart.runtime.bundle import Bundle
from headstart.runtime.contract import LOGITS
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.prefill import last_logits, prefill, run_decoder
from headstart.runtime.tree import ROOT

BundleOf = Callable[[str], Bundle]
CAUSAL = (*ARCHITECTURES, *SELF_POSITIONED, *LENGTH_DEPENDENT)


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_equal_torch(name: str, bundle_of: BundleOf) -> None:
    engine = OnnxRuntimeEngine(bundle_of(name))
    ids = np.random.default_rng(1).integers(0, engine.model.vocab_size, (1, 40))
    reference = reference_logits(tiny_model(name), ids)[0]
    difference = np.abs(all_logits(engine, ids[0]) - reference).max()
    assert difference <= 1e-4 * (reference.max() - reference.min())


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_tokens_equal_transformers_generate(name: str, bundle_of: BundleOf) -> None:
    engine = OnnxRuntimeEngine(bundle_of(name))
    prompt = np.random.default_rng(2).integers(0, engine.model.vocab_size, (1, 20))
    wanted = reference_greedy(tiny_model(name), prompt, 32)[0].tolist()
    cache = engine.graph("decoder").new_state(1, 64)
    logits = last_logits(prefill(engine, cache, prompt[0].tolist()))
    tokens = []
    for _ in range(32):
        tokens.append(int(logits.argmax()))
        logits = last_logits(prefill(engine, cache, tokens[-1:]))
    assert tokens == wanted


@pytest.mark.parametrize("name", CAUSAL)
def test_tree_rows_equal_their_paths(name: str, bundle_of: BundleOf) -> None:
    """Each node of a random tree gets the logits it would get as the end of its own chain."""
    engine = OnnxRuntimeEngine(bundle_of(name))
    generator = np.random.default_rng(3)
    prompt = generator.integers(3, engine.model.vocab_size, 20).tolist()
    tree = random_tree(generator, 9, engine.model.vocab_size)
    cache = engine.graph("decoder").new_state(1, 64)
    prefill(engine, cache, prompt[:-1])
    rows = len(tree) + 1
    token_ids = np.array([[prompt[-1], *tree.token_ids]])
    positions = len(prompt) - 1 + tree.depths()[None]
    output = run_decoder(engine, cache, token_ids, positions, tree.ancestor_mask()[None], np.arange(rows)[None])
    for row in range(rows):
        path, node = [], row - 1
        while node != ROOT:
            path.insert(0, int(tree.token_ids[node]))
            node = int(tree.parents[node])
        alone = all_logits(engine, np.array(prompt + path))[-1]
        assert np.abs(output[LOGITS][0, row] - alone).max() <= 1e-4 * (alone.max() - alone.min())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_golden_check_fails_for_another_model(name: str, bundle_of: BundleOf) -> None:
    engine, golden = OnnxRuntimeEngine(bundle_of(name)), read_golden(bundle_of(name))
    assert check_golden(engine, golden, "float32").ok
    golden["top_logits"] = golden["top_logits"] + 0.01 * golden["spread"][..., None]
    assert not check_golden(engine, golden, "float32").ok


def test_graph_holds_standard_operators_only(bundle_of: BundleOf) -> None:
    import onnx

    bundle = bundle_of("gemma2")
    model = onnx.load(bundle.path / "graphs/decoder.onnx", load_external_data=False)
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 24)}
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(str(bundle.path / "graphs/decoder.onnx"))


def test_tied_weights_are_stored_once(bundle_of: BundleOf) -> None:
    def data_size(name: str) -> int:
        return (bundle_of(name).path / "graphs/decoder.onnx.data").stat().st_size

    model = bundle_of("llama").manifest.model
    assert data_size("llama") - data_size("llama_tied") >= 4 * model.vocab_size * model.hidden_size - 4096

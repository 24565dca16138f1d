"""Comparing an engine with what the checkpoint computes: logits of a text, greedy tokens, trees, commits.

Shared by the end of `export`, `quantize` and `verify`. Knows engines and arrays; knows nothing of torch.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.runtime.bundle import Bundle
from headstart.runtime.contract import AUX_HIDDEN, LOGITS
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import CheckpointError, EngineError
from headstart.runtime.graph import Engine, Outputs
from headstart.runtime.precision import LIMITS, Difference, Limits, difference
from headstart.runtime.prefill import last_logits, open_state, prefill, run_decoder
from headstart.runtime.states import State
from headstart.runtime.tree import ROOT, DraftTree

from .golden import Reference, Texts, read_golden

NODES = 9  # of the random tree
AFTER_COMMIT = 4  # tokens that are read after a part of the tree was committed


@dataclass(frozen=True)
class Comparison:
    """One graph's output and what the checkpoint gives for the same input, [rows, …] each.

    Attributes:
        graph: "decoder" or "encoder".
        what: which output, on which path through the engine.
    """

    graph: str
    what: str
    ours: NDArray[np.float32]
    reference: NDArray[np.float32]


def compare_export(bundle: Bundle, reference: Reference) -> Difference:
    """Run the exported graphs on the golden inputs and compare them with the checkpoint; returns the largest difference.

    On each text: the encoder's states, the logits of a prefill (special tokens included) and the chosen layers' hidden states,
    greedy tokens one at a time, a random tree against its paths, and what is read after a part of that tree was committed.

    Raises:
        CheckpointError: a difference beyond the precision's limit, NaN or infinity; names the graph.
        MissingExtraError, EngineError: ONNX Runtime is missing, or cannot run the graphs.
    """
    golden, engine = read_golden(bundle), OnnxRuntimeEngine(bundle)
    limits = _both_rounding(bundle.manifest.model.dtype)
    worst = Difference(0.0, 0.0)
    texts = Texts(golden["input_ids"], golden.get("sources")).pairs()
    for text, ((token_ids, source), greedy) in enumerate(zip(texts, golden["greedy"], strict=True)):
        for comparison in _comparisons(engine, reference, text, token_ids, greedy, source):
            found = _difference(bundle, comparison)
            if not found.within(limits):
                raise CheckpointError(
                    f"The exported {comparison.graph} computes something else than the checkpoint: {comparison.what} differ by "
                    f"{found.largest:.1e} of their range (median {found.median:.1e}); {limits.largest:.0e} (median "
                    f"{limits.median:.0e}) is allowed: {limits.why}. {bundle.manifest.model.architecture} is not supported as "
                    "it is. Fix: report this; --no-check writes the bundle all the same."
                )
            worst = Difference(max(worst.largest, found.largest), max(worst.median, found.median))
    return worst


def _both_rounding(dtype: str) -> Limits:
    """In half precision the checkpoint is computed in that, too, and rounds on its own: its error may add to the graph's."""
    limits = LIMITS[dtype]
    if dtype == "float32":
        return limits
    return dataclasses.replace(limits, largest=2 * limits.largest, median=2 * limits.median)


def _difference(bundle: Bundle, comparison: Comparison) -> Difference:
    try:
        return difference(comparison.graph, comparison.ours, comparison.reference)
    except EngineError as error:  # NaN or infinity
        raise CheckpointError(f"{bundle.manifest.model.architecture} is not exported. {error}") from error


def _comparisons(
    engine: OnnxRuntimeEngine,
    reference: Reference,
    text: int,
    token_ids: NDArray[np.int64],
    greedy: NDArray[np.int64],
    source: NDArray[Any] | None,
) -> Iterator[Comparison]:
    if source is not None:
        encoded = engine.encode([source])
        yield Comparison("encoder", "its states", encoded.hidden[0], reference.encoded(text))
    outputs = _prefilled(engine, token_ids, source)
    yield Comparison("decoder", "the logits of a prefill", np.array(outputs[LOGITS][0]), reference.logits(text, token_ids))
    layers = engine.model.aux_layers
    if layers and AUX_HIDDEN in outputs:
        wanted = reference.hidden(text, token_ids, layers)
        yield Comparison("decoder", f"the hidden states of layers {layers}", np.array(outputs[AUX_HIDDEN][0]), wanted)
    special = _with_special(reference.model, token_ids)
    if text == 0 and special is not None:
        logits = all_logits(engine, special, source)
        yield Comparison("decoder", "the logits of special tokens", logits, reference.logits(text, special))
    state = open_state(engine, len(token_ids) + len(greedy), source)
    steps = [last_logits(prefill(engine, state, token_ids.tolist())), *step_logits(engine, state, greedy[:-1])]
    wanted = reference.logits(text, np.concatenate([token_ids, greedy]))[len(token_ids) - 1 : -1]
    yield Comparison("decoder", "the logits of greedy decoding", np.stack(steps), wanted)
    yield from _tree_comparisons(engine, reference, text, token_ids, source)


def _with_special(model: Any, token_ids: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """The text with padding and other special tokens in it; None where padding is not counted (see `without_padding`)."""
    from .architectures import shifted_embeddings

    if model.config.is_encoder_decoder or shifted_embeddings(model):
        return None
    rules, config = model.generation_config, model.config.get_text_config()
    named = [rules.pad_token_id, rules.bos_token_id, config.pad_token_id, config.bos_token_id, *_zero_rows(model)]
    known = sorted({int(token) for token in named if token is not None and 0 <= token < config.vocab_size})
    special: NDArray[np.int64] = token_ids.copy()
    special[1 : 1 + len(known)] = known[: len(special) - 1]
    return special


def _zero_rows(model: Any) -> list[int]:
    """The first token whose embedding is all zeros, if any: norms of it rest on their epsilon alone."""
    table = model.get_input_embeddings().weight
    return [int(row) for row in (table == 0).all(dim=1).nonzero()[:1, 0]]


def _tree_comparisons(
    engine: OnnxRuntimeEngine, reference: Reference, text: int, token_ids: NDArray[np.int64], source: NDArray[Any] | None
) -> Iterator[Comparison]:
    """A tree of the text's own tokens after its first half, then a part of it committed and more of the text read."""
    half = len(token_ids) // 2
    tree, history = _random_tree(token_ids[:NODES], seed=text), token_ids[:half]
    state = open_state(engine, len(token_ids) + NODES + AFTER_COMMIT + 1, source)
    prefill(engine, state, history[:-1].tolist())
    rows = np.arange(len(tree) + 1)
    ids = np.concatenate([history[-1:], tree.token_ids])[None]
    positions = half - 1 + tree.depths()[None]
    logits = np.array(run_decoder(engine, state, ids, positions, tree.ancestor_mask()[None], rows[None])[LOGITS][0])
    paths = [_path(tree, row - 1) for row in rows.tolist()]
    wanted = [reference.logits(text, np.concatenate([history, tree.token_ids[path]]))[-1] for path in paths]
    yield Comparison("decoder", "the logits of a draft tree", logits, np.stack(wanted))
    kept = max(paths, key=len)[:2]  # one that is not the tree's first branch moves rows
    state.commit(0, [0, *(node + 1 for node in kept)])
    rest = token_ids[half : half + AFTER_COMMIT]
    ours = np.stack(step_logits(engine, state, rest))
    so_far = np.concatenate([history, tree.token_ids[kept], rest])
    yield Comparison("decoder", "the logits after a partial commit", ours, reference.logits(text, so_far)[-len(rest) :])


def _random_tree(token_ids: NDArray[np.int64], seed: int) -> DraftTree:
    """Over those tokens in turn; the first node has a sibling, so that the deepest path is not one block of rows."""
    generator = np.random.default_rng(seed)
    parents = [ROOT, ROOT, *(int(generator.integers(1, node)) for node in range(2, len(token_ids)))]
    return DraftTree(token_ids, np.array(parents[: len(token_ids)], np.int64), np.zeros(len(token_ids), np.float32))


def _path(tree: DraftTree, node: int) -> list[int]:
    """The nodes from the root's child to `node`; none for the root."""
    return [] if node == ROOT else [*_path(tree, int(tree.parents[node])), node]


def _prefilled(engine: Engine, token_ids: NDArray[np.int64], source: NDArray[Any] | None) -> Outputs:
    """One pass over a whole text, every row through the LM head."""
    count = len(token_ids)
    rows, state = np.arange(count)[None], open_state(engine, count, source)
    return run_decoder(engine, state, token_ids[None], rows, np.tri(count, dtype=np.bool_)[None], rows)


def all_logits(engine: Engine, token_ids: NDArray[np.int64], source: NDArray[Any] | None = None) -> NDArray[np.float32]:
    """[T, V] logits of every row of one text, in one forward."""
    return np.array(_prefilled(engine, token_ids, source)[LOGITS][0])


def step_logits(engine: Engine, state: State, token_ids: NDArray[np.int64]) -> list[NDArray[np.float32]]:
    """[V] logits after each of the tokens, read one at a time after what the state of one sequence holds."""
    return [last_logits(prefill(engine, state, [token])) for token in token_ids.tolist()]


def greedy_tokens(engine: Engine, prompt: list[int], count: int, source: NDArray[Any] | None = None) -> NDArray[np.int64]:
    """[count] tokens of plain greedy decoding, one row at a time, without end tokens or logit rules."""
    cache = open_state(engine, len(prompt) + count, source)
    tokens = [int(last_logits(prefill(engine, cache, prompt)).argmax())]
    while len(tokens) < count:
        tokens.append(int(last_logits(prefill(engine, cache, tokens[-1:])).argmax()))
    return np.array(tokens, np.int64)


def compare_greedy(engine: Engine, prompt: list[int], wanted: list[int], source: NDArray[Any] | None = None) -> float | None:
    """None when the engine's greedy tokens equal `wanted`, else the relative top-2 margin where they first differ."""
    cache = open_state(engine, len(prompt) + len(wanted), source)
    logits = last_logits(prefill(engine, cache, prompt))
    for token in wanted:
        if int(logits.argmax()) != token:
            return top_two_margin(logits) / float(logits.max() - logits.min())
        logits = last_logits(prefill(engine, cache, [token]))
    return None


def top_two_margin(logits: NDArray[np.float32]) -> float:
    """Between the two highest of [V] logits."""
    best = np.partition(logits, -2)[-2:]
    return float(best[1] - best[0])

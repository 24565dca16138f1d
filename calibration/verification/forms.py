"""The forms in which decoding runs a graph, each against the canonical graph's plain pass over the same text.

Trees check masks and positions, commits check cache slots, batches that sequences do not touch one another, chunks that history
is read as it was written. Texts are short, so that each ancestor carries weight in attention.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from headstart.runtime.graph import MAX_ROWS, Engine
from headstart.runtime.tree import ROOT, DraftTree

from .logits import Comparison
from .outcome import LogitCheck
from .passes import Decoding
from .reference import Reference, Text

NODES = 11  # of a tree
HISTORIES = (2, 5, 12)  # tokens before a tree, its root included
TREES = 2  # per text, history and kind of tokens: one tree alone may hide what two show
ROUNDS = 3  # trees one after another, a path of each committed
CHUNKS = (1, 7, 16)  # rows a forward
LONGEST = 40  # tokens of a text
LEAST = 2  # a tree's root always has a history: the prompt
SLOTS = LONGEST + ROUNDS * (NODES + 1) + MAX_ROWS


def check_forms(engine: Engine, reference: Reference, texts: Sequence[Text], precision: str, batch: int) -> list[LogitCheck]:
    """Trees, commits, batches of `batch` sequences (none for 1) and chunked prefill."""
    longest = min(LONGEST, engine.model.max_cache // 2)
    texts = [Text(text.token_ids[:longest] + (0,) * (LEAST - len(text.token_ids)), text.source) for text in texts]
    checks = [check_trees, check_commits, check_chunks]
    results = [check(engine, reference, texts, precision) for check in checks]
    return results if batch < 2 else [*results, check_batch(engine, reference, texts, precision, batch)]


def random_tree(generator: np.random.Generator, tokens: Sequence[int], nodes: int = NODES) -> DraftTree:
    """Branches anywhere; its tokens are drawn from `tokens`."""
    parents = [int(generator.integers(ROOT, node)) if node else ROOT for node in range(nodes)]
    return DraftTree(generator.choice(tokens, nodes).astype(np.int64), np.array(parents), -np.arange(nodes, dtype=np.float32))


def _vocabularies(engine: Engine, text: Text) -> Iterator[Sequence[int]]:
    """Tokens of the text's kind, and any."""
    yield text.token_ids
    yield range(engine.model.vocab_size)


def check_trees(engine: Engine, reference: Reference, texts: Sequence[Text], precision: str) -> LogitCheck:
    """Each row of random trees after short and longer histories."""
    comparison = Comparison("trees", reference.name, precision, reference.limits(precision))
    generator = np.random.default_rng(0)
    for text in texts:
        for length in {min(length, len(text.token_ids)) for length in HISTORIES}:
            history = text.token_ids[:length]
            for tokens in _vocabularies(engine, text):
                for _ in range(TREES):
                    tree = random_tree(generator, tokens)
                    decoding = Decoding(engine, 1, SLOTS, text.source)
                    decoding.prefill(0, history[:-1])
                    ours = decoding.verify([history[-1]], [tree])[0]
                    comparison.add(ours, reference.tree_logits(history, tree, text.source))
    return comparison.result()


def check_commits(engine: Engine, reference: Reference, texts: Sequence[Text], precision: str) -> LogitCheck:
    """Rounds of trees of which one path is kept: what follows reads the slots that the commit moved."""
    comparison = Comparison("commits", reference.name, precision, reference.limits(precision))
    generator = np.random.default_rng(1)
    for text in texts:
        for tokens in _vocabularies(engine, text):
            history = list(text.token_ids[: HISTORIES[1]])
            decoding = Decoding(engine, 1, SLOTS, text.source)
            decoding.prefill(0, history[:-1])
            for _ in range(ROUNDS):
                tree = random_tree(generator, tokens)
                ours = decoding.verify([history[-1]], [tree])[0]
                comparison.add(ours, reference.tree_logits(history, tree, text.source))
                rows = partial_path(generator, tree)
                decoding.commit(0, rows)
                history += [int(tree.token_ids[row - 1]) for row in rows[1:]] + [int(generator.choice(tokens))]
    return comparison.result()


def partial_path(generator: np.random.Generator, tree: DraftTree) -> list[int]:
    """Rows of the path to a node other than the first, the root's row first: a commit that has to move slots."""
    node = int(generator.integers(1, len(tree))) if len(tree) > 1 else ROOT
    rows: list[int] = []
    while node != ROOT:
        rows.insert(0, node + 1)
        node = int(tree.parents[node])
    return [0, *rows]


def check_chunks(engine: Engine, reference: Reference, texts: Sequence[Text], precision: str) -> LogitCheck:
    """Prefill in chunks of several sizes, every row."""
    comparison = Comparison("chunked prefill", reference.name, precision, reference.limits(precision))
    for text in texts:
        theirs = reference.logits(text)
        for chunk in CHUNKS:
            comparison.add(Decoding(engine, 1, SLOTS, text.source).prefill(0, text.token_ids, chunk), theirs)
    return comparison.result()


def check_batch(engine: Engine, reference: Reference, texts: Sequence[Text], precision: str, batch: int) -> LogitCheck:
    """Sequences of unequal lengths, trees and commits, decoded together; each against itself alone."""
    comparison = Comparison("batch", reference.name, precision, reference.limits(precision))
    generator = np.random.default_rng(2)
    for text in texts:
        decoding = Decoding(engine, batch, SLOTS, text.source)
        histories = [list(text.token_ids[: max(LEAST, len(text.token_ids) - 3 * row)]) for row in range(batch)]
        for row, history in enumerate(histories):
            decoding.prefill(row, history[:-1])
        for _ in range(ROUNDS):
            trees = [random_tree(generator, text.token_ids, NODES - 2 * row) for row in range(batch)]
            found = decoding.verify([history[-1] for history in histories], trees)
            for row, (history, tree) in enumerate(zip(histories, trees, strict=True)):
                comparison.add(found[row], reference.tree_logits(history, tree, text.source))
                rows = partial_path(generator, tree)
                decoding.commit(row, rows)
                history += [int(tree.token_ids[r - 1]) for r in rows[1:]] + [int(generator.choice(text.token_ids))]
    return comparison.result()

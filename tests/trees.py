"""Trees to test with."""

import numpy as np

from headstart.runtime.tree import ROOT, DraftTree


def random_tree(generator: np.random.Generator, nodes: int, vocab_size: int) -> DraftTree:
    parents = [int(generator.integers(ROOT, node)) if node else ROOT for node in range(nodes)]
    tokens = generator.integers(3, vocab_size, nodes)
    return DraftTree(tokens, np.array(parents), -np.arange(nodes, dtype=np.float32))

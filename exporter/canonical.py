"""A bundle's canonical graphs by name: the target's own as the manifest calls them, and `heads/<name>` for each draft head."""

import onnx_ir as ir

from headstart.runtime.bundle import Bundle, HeadInfo

from .heads.storage import load_head

HEADS = "heads/"


def head_of(bundle: Bundle, graph: str) -> HeadInfo | None:
    """The draft head that a graph belongs to; None for the target's own graphs."""
    return bundle.head(graph.removeprefix(HEADS)) if graph.startswith(HEADS) else None


def load_graph(bundle: Bundle, graph: str) -> ir.Model:
    """One canonical graph, with the weights it shares with others. Raises KeyError for a name that the bundle lacks."""
    if graph.startswith(HEADS):
        return load_head(bundle, graph.removeprefix(HEADS))
    return ir.load(bundle.path / bundle.manifest.graphs[graph].file)

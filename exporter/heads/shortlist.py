"""A short list: a copy of the rows of the target's LM head that texts use most, as a head of the bundle.

How it is used, and where the idea is from: `runtime.drafters.shortlist`.
"""

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from headstart.exporter.graph import described_graph, tensor_infos
from headstart.exporter.graph_builder import GraphBuilder
from headstart.exporter.passes.rotation import rotate
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, GraphInfo, HeadInfo, Manifest
from headstart.runtime.documents import to_json
from headstart.runtime.drafters.shortlist import SHORTLIST
from headstart.runtime.errors import HeadError, OptionError
from headstart.runtime.token_rows import LM_HEAD, TokenRows, TokenTable

from .install import install_head
from .storage import copied_rows, save_head

LEAST = 16  # tokens
WORTHWHILE = 2  # times as many tokens in the vocabulary: else the whole LM head takes hardly longer


def add_shortlist(bundle: str | Path, token_ids: NDArray[np.int64], name: str = SHORTLIST, force: bool = False) -> HeadInfo:
    """Write a short list of these tokens into a finished bundle, as `heads/<name>`; an engine has to be built again after it.

    Raises:
        BundleError: no valid bundle.
        HeadError: the target's graph does not show which weight its LM head is, its vocabulary lacks one of the tokens, or a
            name that no head can have.
        OptionError: too few tokens, or so many that deciding with them saves nothing.
        OutputError: the bundle has a head of that name (unless `force`).
    """
    opened = Bundle.load(Path(bundle).resolve())
    token_ids = np.unique(token_ids)
    check_count(opened, len(token_ids))
    _check_known(token_ids, opened.manifest.model.vocab_size)

    def write(workplace: Path, others: Manifest) -> Manifest:
        folder = workplace / "heads" / name
        folder.mkdir(parents=True)
        info = _write(opened, token_ids, folder, name)
        (folder / "head.json").write_text(to_json(info), "utf-8")
        return dataclasses.replace(others, heads=(*others.heads, name))

    return install_head(opened, name, write, force)


def check_count(bundle: Bundle, count: int) -> None:
    """Raises OptionError for a number of tokens that makes no short list, HeadError for a bundle that cannot have one."""
    vocab_size = bundle.manifest.model.vocab_size
    if not LEAST <= count <= vocab_size // WORTHWHILE:
        raise OptionError(
            f"A short list of {count} of {vocab_size} tokens saves nothing. Fix: --tokens from {LEAST} to "
            f"{vocab_size // WORTHWHILE}."
        )
    if "lm_head" not in bundle.manifest.weights:
        raise HeadError(f"{bundle.path} does not show which weight its LM head is, so that no rows of it can be copied.")


def _check_known(token_ids: NDArray[np.int64], vocab_size: int) -> None:
    """Of ids in rising order."""
    if token_ids[0] < 0 or token_ids[-1] >= vocab_size:
        raise HeadError(
            f"A short list names tokens from 0 to {vocab_size - 1}, the target's vocabulary; found {token_ids[0]} to "
            f"{token_ids[-1]}. Fix: tokens of this very target."
        )


def _write(bundle: Bundle, token_ids: NDArray[np.int64], folder: Path, name: str) -> HeadInfo:
    model = bundle.manifest.model
    rows = TokenTable(bundle.path, bundle.manifest.weights, LM_HEAD, model.hidden_size).rows(token_ids)
    graph = _write_graph(rows, token_ids, folder / "head.onnx", f"heads/{name}/head.onnx")
    return HeadInfo(
        name=name,
        family=SHORTLIST,
        dialect="headstart",
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        heads=1,
        top_k=len(token_ids),
        graph=graph,
    )


def _write_graph(rows: TokenRows, token_ids: NDArray[np.int64], file: Path, name: str) -> GraphInfo:
    """`hidden` [B, R, H] to `short_logits` [B, R, K] float32, and `short_ids` [K] int64."""
    hidden, graph = rows.values.shape[1], GraphBuilder()
    source = ir.val(contract.HIDDEN, ir.DataType.FLOAT, (contract.BATCH, contract.ROWS, hidden))
    state = rotate(graph, source, 3, hidden, rows.rotation) if rows.rotation else source
    logits = graph.node("MatMul", [state, copied_rows(graph, rows)])
    logits.name, logits.dtype = contract.SHORT_LOGITS, ir.DataType.FLOAT
    logits.shape = ir.Shape((contract.BATCH, contract.ROWS, len(token_ids)))
    ids = graph.node("Identity", [graph.constant("token_ids", token_ids)])
    ids.name, ids.dtype, ids.shape = contract.SHORT_IDS, ir.DataType.INT64, ir.Shape((len(token_ids),))
    save_head(graph.model([source], [logits, ids], "shortlist"), file)
    return described_graph(name, tensor_infos([source]), tensor_infos([logits, ids]))

"""Recurrent drafting's head and MLP speculators against their formulas in torch."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drafted_tree import assert_same_tree, searched
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, silu

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.exporter.build import build
from headstart.exporter.heads.install import import_head
from headstart.exporter.heads.recurrent_drafting import LEVELS
from headstart.runtime.bundle import Bundle
from headstart.runtime.drafters.recurrent import RootInput
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import HeadError
from headstart.runtime.loading import load
from headstart.runtime.token_rows import EMBEDDINGS, TokenTable

BundleOf = Callable[[str], Bundle]
HIDDEN, VOCAB, CANDIDATES, ROOTS = 64, 300, 10, [5, 77]
REDRAFTER = {"model_type": "recurrent_drafting_drafter", "num_draft_layers": 2}


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5


def write_head(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def hidden_states() -> Tensor:
    return torch.randn(len(ROOTS), 1, HIDDEN, generator=torch.Generator().manual_seed(3))


def outputs_of(bundle: Path, name: str) -> Any:
    loaded = Bundle.load(bundle)
    read = RootInput(loaded, loaded.head(name)).of(np.array(ROOTS))
    return OnnxRuntimeEngine(loaded).graph(f"heads/{name}").run({"hidden": hidden_states().numpy(), **read})


@pytest.fixture
def bundle(bundle_of: BundleOf, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_of("llama").path, tmp_path / "bundle"))


def redrafter(exit_dim: int, recurrent: bool, blocks: int = 2) -> dict[str, Tensor]:
    generator, tensors = torch.Generator().manual_seed(0), {}
    if recurrent:
        tensors |= {f"rnn_{part}.weight": random(generator, HIDDEN, HIDDEN) for part in ("w", "u")}
        tensors["rnn_u.bias"] = random(generator, HIDDEN)
    if exit_dim != 2 * HIDDEN:
        tensors["input_proj.weight"] = random(generator, exit_dim, 2 * HIDDEN)
        tensors["input_proj.bias"] = random(generator, exit_dim)
    for block in range(blocks):
        tensors[f"lm_head.{block}.linear.weight"] = random(generator, exit_dim, exit_dim)
        tensors[f"lm_head.{block}.linear.bias"] = random(generator, exit_dim)
    return tensors | {f"lm_head.{blocks}.weight": 4 * random(generator, VOCAB, exit_dim)}


def redrafter_logits(tensors: dict[str, Tensor], hidden: Tensor, embedded: Tensor) -> Tensor:
    """[V] after [n, H] embeddings, by the published model's arithmetic."""
    state = torch.zeros(HIDDEN)
    for one in embedded:
        if "rnn_w.weight" in tensors:
            state = silu(tensors["rnn_w.weight"] @ one + tensors["rnn_u.weight"] @ state + tensors["rnn_u.bias"])
        else:
            state = one + state
    x = torch.cat([hidden, state])
    if "input_proj.weight" in tensors:
        x = tensors["input_proj.weight"] @ x + tensors["input_proj.bias"]
    for block in range(2):
        x = x + silu(tensors[f"lm_head.{block}.linear.weight"] @ x + tensors[f"lm_head.{block}.linear.bias"])
    return tensors["lm_head.2.weight"] @ x


@pytest.mark.parametrize(("exit_dim", "recurrent"), [(2 * HIDDEN, True), (96, True), (2 * HIDDEN, False)])
def test_recurrent_drafting(bundle: Path, tmp_path: Path, exit_dim: int, recurrent: bool) -> None:
    tensors, config = redrafter(exit_dim, recurrent), {**REDRAFTER, "rnn": recurrent, "exit_dim": exit_dim}
    info = import_head(bundle, write_head(tmp_path / "head", tensors, config))
    assert (info.name, info.dialect, info.heads) == ("recurrent_drafting", "ml-recurrent-drafter", LEVELS)
    outputs = outputs_of(bundle, info.name)
    table = torch.from_numpy(TokenTable(bundle, info.embeddings, EMBEDDINGS, HIDDEN).rows(np.arange(VOCAB)).floats())
    for row, root in enumerate(ROOTS):

        def logits(path: list[int], row: int = row, root: int = root) -> Tensor:
            return redrafter_logits(tensors, hidden_states()[row, 0], table[[root, *path]])

        assert_same_tree(outputs, row, searched(logits, LEVELS, CANDIDATES), range(VOCAB))


def speculator(levels: int, width: int, tied: bool) -> dict[str, Tensor]:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for level in range(levels):
        if level == 0 or not tied:
            tensors[f"speculator.emb.{level}.weight"] = random(generator, VOCAB, width)
            tensors[f"speculator.head.{level}.weight"] = 8 * random(generator, VOCAB, width)
            tensors[f"speculator.ln.{level}.weight"] = 1 + random(generator, width)
            tensors[f"speculator.ln.{level}.bias"] = random(generator, width)
        if level < 2 or not tied:
            tensors[f"speculator.proj.{level}.weight"] = random(generator, width, HIDDEN if level == 0 else width)
    return tensors


def speculator_logits(tensors: dict[str, Tensor], levels: int, scaled: bool, hidden: Tensor, tokens: list[int]) -> Tensor:
    """[V] after these tokens, by the published model's arithmetic."""

    def of(name: str, level: int, kind: str = "weight") -> Tensor:
        last = max(i for i in range(level + 1) if f"speculator.{name}.{i}.{kind}" in tensors)
        return tensors[f"speculator.{name}.{last}.{kind}"]

    def normalized(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean() + 1e-6)

    state_weight = 0.5 ** (0.5 / levels)
    state = normalized(hidden) / 2**0.5 if scaled else hidden
    for level, token in enumerate(tokens):
        embedded = of("emb", level)[token]
        embedded = embedded * math.sqrt(1 - state_weight**2) * math.sqrt(len(embedded) / 2)
        inner = normalized(of("proj", level) @ state * state_weight + embedded)
        state = gelu(inner * of("ln", level) + of("ln", level, "bias"))
    return of("head", len(tokens) - 1) @ state


@pytest.mark.parametrize(
    ("levels", "width", "tied", "scaled"), [(3, 96, False, False), (4, HIDDEN, True, True), (1, 32, False, True)]
)
def test_mlp_speculators(bundle: Path, tmp_path: Path, levels: int, width: int, tied: bool, scaled: bool) -> None:
    tensors = speculator(levels, width, tied)
    config = {"model_type": "mlp_speculator", "n_predict": levels, "inner_dim": width, "scale_input": scaled}
    info = import_head(bundle, write_head(tmp_path / "head", tensors, config))
    assert (info.name, info.heads, info.embeddings) == ("mlp_speculator", levels, {})
    outputs = outputs_of(bundle, info.name)
    for row, root in enumerate(ROOTS):

        def logits(path: list[int], row: int = row, root: int = root) -> Tensor:
            return speculator_logits(tensors, levels, scaled, hidden_states()[row, 0], [root, *path])

        assert_same_tree(outputs, row, searched(logits, levels, CANDIDATES), range(VOCAB))
    stored = sum(file.stat().st_size for file in (bundle / "heads/mlp_speculator").iterdir())
    assert stored < sum(4 * tensor.numel() for tensor in tensors.values()) + 60_000, "tied weights are stored once"


@pytest.mark.parametrize("family", ["recurrent_drafting", "mlp_speculator"])
def test_quantized_and_built_they_draft_and_change_nothing(bundle: Path, tmp_path: Path, family: str) -> None:
    if family == "mlp_speculator":
        folder = write_head(tmp_path / "head", speculator(3, 96, False), {"model_type": family, "n_predict": 3})
    else:
        folder = write_head(tmp_path / "head", redrafter(2 * HIDDEN, True), REDRAFTER)
    import_head(bundle, folder)
    quantize(bundle, tmp_path / "int8", QuantizeOptions(weights="int8"))
    options: dict[str, Any] = {"max_new_tokens": 20, "ignore_end": True}
    for target in (bundle, tmp_path / "int8"):
        build(target)
        model = load(target)
        drafted, plain = (model.generate("def f(x):", drafter=name, **options) for name in (family, "none"))
        assert drafted.token_ids == plain.token_ids and drafted.stats.drafted_tokens > 20


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"lm_head.2.weight": None}, REDRAFTER, r"lm_head\.2\.weight must be \[300, 128\], found none"),
        ({"rnn_w.weight": torch.zeros(9, 9)}, REDRAFTER, r"rnn_w\.weight must be \[64, 64\], found \[9, 9\]"),
        ({}, {"model_type": "mlp_speculator"}, "must state n_predict, at least 1, found None"),
        ({"speculator.emb.0.weight": torch.zeros(9, 96)}, {"n_predict": 3}, r"emb\.0\.weight must be \[300, 96\]"),
        ({"speculator.ln.0.bias": None}, {"n_predict": 3}, r"ln\.0\.bias must be \[96\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    bundle: Path, tmp_path: Path, tensors: dict[str, Tensor | None], config: dict[str, Any], message: str
) -> None:
    whole = redrafter(2 * HIDDEN, True) if config == REDRAFTER else speculator(3, 96, False)
    changed = {name: tensor for name, tensor in {**whole, **tensors}.items() if tensor is not None}
    with pytest.raises(HeadError, match=message):
        import_head(bundle, write_head(tmp_path / "head", changed, config))
    assert not (bundle / "heads").exists()

"""Hydra heads against the paper's formula in torch: the tree that one graph drafts, and what does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from architectures import save_checkpoint
from drafted_tree import assert_same_tree, searched
from realistic import realistic_model
from safetensors.torch import save_file
from torch import Tensor

from headstart.calibration.quantize import QuantizeOptions, quantize
from headstart.calibration.quantized_heads import import_head
from headstart.calibration.verify import verify
from headstart.exporter.build import build
from headstart.exporter.export import export
from headstart.exporter.heads import install
from headstart.exporter.heads.embeddings import embeddings_of
from headstart.exporter.heads.families import recognise
from headstart.runtime.bundle import Bundle, write_manifest
from headstart.runtime.engines.info import built_engine, engine_folder
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.engines.ort_session import Provider
from headstart.runtime.errors import HeadError
from headstart.runtime.loading import load
from headstart.runtime.token_rows import EMBEDDINGS, TokenTable

BundleOf = Callable[[str], Bundle]
HEADS, LAYERS, HIDDEN, VOCAB, CANDIDATES = 3, 2, 64, 300, 10


def hydra_tensors(hidden: int = HIDDEN, vocab: int | None = VOCAB, dropout: bool = True) -> dict[str, Tensor]:
    """As published: dropout stands before each block, so that the numbers of blocks are odd. No `vocab`: no projections."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    tensors = {}
    for head in range(HEADS):
        for layer in range(LAYERS):
            width = (head + 2) * hidden if layer == 0 else hidden
            parts = ("linear", "res_connection") if layer == 0 else ("linear",)
            for part in parts:
                name = f"hydra_mlp.{head}.{2 * layer + 1 if dropout else layer}.{part}"
                tensors |= {f"{name}.weight": random(hidden, width), f"{name}.bias": random(hidden)}
        if vocab is not None:
            name = f"hydra_lm_head.{head}.1" if dropout else f"hydra_lm_head.{head}"
            tensors |= {f"{name}.weight": 4 * random(vocab, hidden), f"{name}.bias": random(vocab)}
    return tensors


def write_head(folder: Path, tensors: dict[str, Tensor], pickled: bool = False, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hydra_head_arch": "mlp", "hydra_num_heads": 4} | config))  # not 3
    if pickled:
        torch.save(tensors, folder / "hydra_lm_head.pt")
    else:
        save_file(tensors, folder / "hydra_lm_head.safetensors")
    return folder


def logits_of(tensors: dict[str, Tensor], head: int, x: Tensor, lm_head: Tensor | None) -> Tensor:
    """[V'] of x = [h; e; …; e], by the paper's formula."""
    names = sorted({name.rsplit(".", 2)[0] for name in tensors if name.startswith(f"hydra_mlp.{head}.")})
    for number, name in enumerate(names):
        inner = tensors[f"{name}.linear.weight"] @ x + tensors[f"{name}.linear.bias"]
        kept = tensors[f"{name}.res_connection.weight"] @ x + tensors[f"{name}.res_connection.bias"] if number == 0 else x
        x = kept + torch.nn.functional.silu(inner)
    if lm_head is not None:
        return lm_head @ x
    weight = next(tensor for name, tensor in tensors.items() if name.startswith(f"hydra_lm_head.{head}.") and tensor.ndim == 2)
    bias = next(tensor for name, tensor in tensors.items() if name.startswith(f"hydra_lm_head.{head}.") and tensor.ndim == 1)
    return weight @ x + bias


def assert_drafts(
    bundle: Path, tensors: dict[str, Tensor], token_map: list[int] | None = None, tolerance: float = 1e-4
) -> None:
    """The head `hydra` of the bundle, asked about two sequences at once, against the formula."""
    loaded = Bundle.load(bundle)
    model, info = loaded.manifest.model, loaded.head("hydra")

    def rows(table: str, tokens: list[int]) -> Tensor:
        weights = info.embeddings if table == EMBEDDINGS else loaded.manifest.weights
        return torch.from_numpy(TokenTable(bundle, weights, table, model.hidden_size).rows(np.array(tokens)).floats())

    tokens = list(range(model.vocab_size)) if token_map is None else token_map
    table, own = rows(EMBEDDINGS, tokens), any(name.startswith("hydra_lm_head") for name in tensors)
    lm_head = None if own else rows("lm_head", tokens)
    hidden = torch.randn(2, 1, model.hidden_size, generator=torch.Generator().manual_seed(3))
    roots = rows(EMBEDDINGS, [5, 77])
    outputs = (
        OnnxRuntimeEngine(loaded).graph("heads/hydra").run({"hidden": hidden.numpy(), "embedding": roots[:, None].numpy()})
    )
    for row in range(2):
        read = torch.cat([hidden[row, 0], roots[row]])

        def logits(path: list[int], read: Tensor = read) -> Tensor:
            return logits_of(tensors, len(path), torch.cat([read, *table[path]]), lm_head)

        assert_same_tree(outputs, row, searched(logits, HEADS, CANDIDATES), tokens)


@pytest.fixture
def bundle(bundle_of: BundleOf, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_of("llama").path, tmp_path / "bundle"))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_the_graph_drafts_the_tree_of_the_formula(bundle: Path, tmp_path: Path, pickled: bool, dropout: bool) -> None:
    tensors = hydra_tensors(dropout=dropout)
    info = import_head(bundle, write_head(tmp_path / "head", tensors, pickled))
    assert (info.family, info.heads, info.top_k, info.shared) == ("hydra", HEADS, CANDIDATES, {})
    assert_drafts(bundle, tensors)


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gemma3", "bart"])
def test_a_part_of_the_vocabulary_and_the_target_s_lm_head(architecture: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    """Gemma scales what it looks up; heads read the table as it is."""
    bundle = Path(shutil.copytree(bundle_of(architecture).path, tmp_path / "bundle"))
    vocab = Bundle.load(bundle).manifest.model.vocab_size
    token_map = list(range(3, vocab, 4))
    tensors = hydra_tensors(vocab=None) | {"hydra_token_map": torch.tensor(token_map)}
    import_head(bundle, write_head(tmp_path / "head", tensors))
    assert_drafts(bundle, tensors, token_map)


@pytest.mark.parametrize("first", [True, False])
def test_quantizing_before_and_after(bundle_of: BundleOf, tmp_path: Path, first: bool) -> None:
    """Rows of a rotated int8 LM head and table are copied as whole numbers; the head's own weights are rounded either way."""
    source = Path(shutil.copytree(bundle_of("llama_tied").path, tmp_path / "source"))
    drafted = list(range(0, VOCAB, 2))
    tensors = hydra_tensors(vocab=None) | {"hydra_token_map": torch.tensor(drafted)}
    head, target = write_head(tmp_path / "head", tensors), tmp_path / "bundle"
    if first:
        import_head(source, head)
    quantize(source, target, QuantizeOptions(weights="int8"))
    if not first:
        install.import_head(target, head)
        assert_drafts(target, tensors, drafted)
        import_head(target, head, "hydra", force=True)
    lie = Bundle.load(target).head("hydra").embeddings
    assert lie == embeddings_of(target) and lie[EMBEDDINGS].dtype == "int8" and lie[EMBEDDINGS].rotation
    stored = (target / "heads/hydra/head.onnx.data").stat().st_size
    assert stored < 1.3 * sum(tensor.numel() for tensor in tensors.values()) + 2 * len(drafted) * (HIDDEN + 8)
    build(target)
    model = load(target)
    drawn = model.generate("def f(x):", drafter="hydra", max_new_tokens=20, ignore_end=True)
    assert drawn.stats.drafted_tokens > 20
    plain = model.generate("def f(x):", drafter="none", max_new_tokens=20, ignore_end=True)
    assert drawn.token_ids == plain.token_ids


def test_what_is_drafted_is_what_plain_decoding_writes(bundle: Path, tmp_path: Path) -> None:
    """In batches, built or not, greedily and with seeds that repeat."""
    import_head(bundle, write_head(tmp_path / "head", hydra_tensors()))
    prompts = ["def f(x):", "import os\nimport", "x"]
    for _ in range(2):
        model = load(bundle)
        options: dict[str, Any] = {"max_new_tokens": 24, "ignore_end": True}
        plain = model.generate(prompts, drafter="none", **options)
        found = model.generate(prompts, drafter="hydra", **options)
        assert [one.token_ids for one in found] == [one.token_ids for one in plain]
        assert all(one.stats.drafted_tokens > 24 for one in found)
        sampled = [model.generate(prompts, drafter="hydra", temperature=0.8, seed=3, **options) for _ in range(2)]
        assert [one.token_ids for one in sampled[0]] == [one.token_ids for one in sampled[1]]
        build(bundle, force=True)


def test_what_does_not_fit_is_refused(bundle: Path, tmp_path: Path) -> None:
    def refused(name: str, tensors: dict[str, Tensor], message: str, **config: Any) -> None:
        folder = write_head(tmp_path / name, tensors, **config)
        with pytest.raises(HeadError, match=message):
            recognise(folder)
            import_head(bundle, folder)
        assert not (bundle / "heads" / "hydra").exists()

    tensors = hydra_tensors()
    refused("other", tensors, "prefix-mlp, and have attention", hydra_head_arch="prefix-mlp")
    refused("wide", hydra_tensors(hidden=32), r"linear of head 0, block 1 must have a weight \[64, 128\], found \[32, 64\]")
    refused("words", hydra_tensors(vocab=VOCAB + 1), r"projections must be \[300, 64\], found \[301, 64\]")
    lost = {name: tensor for name, tensor in tensors.items() if not name.startswith("hydra_mlp.1.1.linear")}
    refused("lost", lost, r"linear of head 1, block 1 must .* found none")
    lost = {name: tensor for name, tensor in tensors.items() if not name.startswith("hydra_mlp.1.")}
    refused("hole", lost, r"head 1, block 0 must .* found none")
    lost = {name: tensor for name, tensor in tensors.items() if not name.startswith("hydra_lm_head.2")}
    refused("half", lost, "some heads have a projection and others have none")
    spoilt = {**tensors, "hydra_mlp.0.1.linear.bias": torch.full((HIDDEN,), torch.nan)}
    refused("nan", spoilt, "holds NaN")
    refused("map", tensors | {"hydra_token_map": torch.tensor([1, 1])}, "token_map must list different tokens")


def test_graphs_lowered_for_gpus_draft_the_same_tree(bundle: Path, tmp_path: Path) -> None:
    """The CUDA provider's form, in float16, run on the CPU."""
    import_head(bundle, write_head(tmp_path / "head", hydra_tensors()))
    build(bundle, "cuda")
    loaded = Bundle.load(bundle)
    info = built_engine(loaded, "cuda")
    assert info is not None
    engine = OnnxRuntimeEngine(
        loaded, built=(info, engine_folder(loaded, "cuda")), provider=Provider(device="cuda", location="cpu")
    )
    generator = np.random.default_rng(0)
    inputs = {name: generator.standard_normal((2, 1, HIDDEN)).astype(np.float32) for name in ("hidden", "embedding")}
    ours, canonical = (one.graph("heads/hydra").run(inputs) for one in (engine, OnnxRuntimeEngine(loaded)))
    assert np.mean(ours["draft_ids"][:, :CANDIDATES] == canonical["draft_ids"][:, :CANDIDATES]) > 0.8
    np.testing.assert_allclose(ours["draft_log_probs"], canonical["draft_log_probs"], atol=0.05)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_shapes_of_published_checkpoints(weights: str, tmp_path: Path) -> None:
    """640 wide, tied, a part of 5,000 tokens: rows of rotated int8 tables, products of all levels."""
    save_checkpoint(realistic_model("llama_tied"), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "float32")
    if weights == "int8":
        quantize(tmp_path / "float32", tmp_path / "int8", QuantizeOptions(weights="int8"))
    drafted = list(range(0, 5000, 2))
    tensors = hydra_tensors(hidden=640, vocab=None) | {"hydra_token_map": torch.tensor(drafted)}
    install.import_head(tmp_path / weights, write_head(tmp_path / "head", tensors))
    assert_drafts(tmp_path / weights, tensors, drafted)
    import_head(tmp_path / weights, tmp_path / "head", "hydra", force=True)
    build(tmp_path / weights)
    model = load(tmp_path / weights)
    options: dict[str, Any] = {"max_new_tokens": 16, "ignore_end": True}
    plain, found = (model.generate("def f(x):", drafter=name, **options) for name in ("none", "hydra"))
    assert found.token_ids == plain.token_ids and found.stats.drafted_tokens > 16


def test_a_head_that_computes_nan_ends_no_request(bundle: Path, tmp_path: Path) -> None:
    """`verify` names it; until then its drafts are drafts like others, tuned or not."""
    import_head(bundle, write_head(tmp_path / "head", hydra_tensors()))
    model = load(bundle)
    plain = model.generate("def f(x):", drafter="none", max_new_tokens=12, ignore_end=True).token_ids
    drafter = model.generator.drafters["hydra"]
    run = drafter._graph.run  # type: ignore[attr-defined]

    def poisoned(inputs: Any) -> Any:
        outputs = run(inputs)
        broken = np.full_like(outputs["draft_log_probs"], np.nan)
        return {name: outputs[name] for name in ("draft_ids", "draft_parents")} | {"draft_log_probs": broken}

    drafter._graph = SimpleNamespace(run=poisoned)  # type: ignore[attr-defined]
    assert model.generate("def f(x):", drafter="hydra", max_new_tokens=12, ignore_end=True).token_ids == plain
    drafter.use_rates(drafter.prior_rates())
    assert model.generate("def f(x):", drafter="hydra", max_new_tokens=12, ignore_end=True).token_ids == plain


def test_verify_looks_at_heads_that_read_tokens(bundle: Path, tmp_path: Path) -> None:
    import_head(bundle, write_head(tmp_path / "head", hydra_tensors()))
    report = verify(bundle, ["abcabc"], 8, samples=50)
    assert report.ok and {check.drafter for check in report.greedy} >= {"hydra", "none"}
    assert any(check.drafter == "hydra" and check.drafted > 50 for check in report.sampling)
    file = bundle / "heads/hydra/head.onnx"
    model = ir.load(file)
    model.graph.initializers["0.projection.bias"].const_value = ir.tensor(np.full(VOCAB, np.nan, np.float32))
    ir.save(model, file)
    write_manifest(bundle, Bundle.load(bundle, check_hashes=False).manifest)
    assert verify(bundle, ["abcabc"], 8, samples=0).faults[0].where.startswith("canonical heads/hydra")

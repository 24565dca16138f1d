"""Medusa heads of every published dialect, against a plain numpy reference; what does not fit is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from headstart.calibration.quantize import quantize
from headstart.exporter.export import export
from headstart.exporter.heads import families, install, medusa
from headstart.exporter.heads.families import recognise
from headstart.exporter.heads.family import Family, Format, Installation, Reads
from headstart.exporter.heads.folder import HeadFolder
from headstart.exporter.heads.install import import_head
from headstart.runtime import contract
from headstart.runtime.bundle import Bundle, HeadInfo, Manifest, write_manifest
from headstart.runtime.engines.ort_engine import OnnxRuntimeEngine
from headstart.runtime.errors import HeadError, OutputError
from headstart.runtime.loading import load

BundleOf = Callable[[str], Bundle]
HEADS, LAYERS, HIDDEN, VOCAB = 3, 2, 64, 300
WRONG_COUNT = {"medusa_num_heads": 2, "medusa_num_layers": 1}  # as published: the files hold more

Blocks = list[list[tuple[torch.Tensor, torch.Tensor]]]


def random_blocks() -> Blocks:
    generator = torch.Generator().manual_seed(0)

    def layer() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(HIDDEN, HIDDEN, generator=generator) / 8, torch.randn(HIDDEN, generator=generator)

    return [[layer() for _ in range(LAYERS)] for _ in range(HEADS)]


def random_projections(vocab: int = VOCAB, hidden: int = HIDDEN) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(vocab, hidden, generator=generator) for _ in range(HEADS)]


def tensors_of(dialect: str, blocks: Blocks, projections: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same heads under each dialect's names."""
    block_name, projection_name = {
        "medusa-1": ("{i}.{j}.linear.", "{i}.{n}.weight"),
        "medusa-2": ("medusa_head.{i}.{j}.linear.", "medusa_head.{i}.{n}.weight"),
        "modelopt": ("medusa_heads.{i}.{j}.linear.", "medusa_heads.{i}.{n}.weight"),
        "vllm": ("blocks.{i}.layers.{j}.", "lm_heads.{i}.weight"),
    }[dialect]
    tensors = {}
    for i, head in enumerate(blocks):
        for j, (weight, bias) in enumerate(head):
            tensors[block_name.format(i=i, j=j) + "weight"] = weight
            tensors[block_name.format(i=i, j=j) + "bias"] = bias
    for i, projection in enumerate(projections):
        tensors[projection_name.format(i=i, n=LAYERS)] = projection
    return tensors


def write_head(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None, pickled: bool = False
) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(WRONG_COUNT if config is None else config))
    if pickled:
        torch.save(tensors, folder / "medusa_lm_head.pt")
    else:
        save_file(tensors, folder / "medusa_lm_head.safetensors")
    return folder


def reference(hidden: NDArray[np.float32], blocks: Blocks, projections: list[NDArray[np.float32]]) -> NDArray[np.float64]:
    """[B, K, V] log-probabilities, by the formula of the paper."""
    rows = []
    for head, projection in zip(blocks, projections, strict=True):
        x = hidden.astype(np.float64)
        for weight, bias in head:
            inner = x @ weight.numpy().T + bias.numpy()
            x = x + inner / (1 + np.exp(-inner))
        logits = x @ projection.T
        rows.append(
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
    return np.stack(rows, axis=1)


@pytest.fixture
def bundle(bundle_of: BundleOf, tmp_path: Path) -> Path:
    """A copy to add heads to."""
    return Path(shutil.copytree(bundle_of("llama_tied").path, tmp_path / "bundle"))


def proposals(bundle: Bundle, name: str, hidden: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
    outputs = OnnxRuntimeEngine(bundle).graph(f"heads/{name}").run({"hidden": hidden})
    return outputs["topk_ids"], outputs["topk_log_probs"]


def assert_equals_reference(
    bundle: Path, name: str, blocks: Blocks, projections: list[NDArray[np.float32]], heads: int = HEADS
) -> None:
    loaded = Bundle.load(bundle)
    hidden = np.random.default_rng(0).standard_normal((2, 1, HIDDEN)).astype(np.float32)
    ids, log_probs = proposals(loaded, name, hidden)
    wanted = reference(hidden[:, 0], blocks, projections)
    assert ids.shape == log_probs.shape == (2, heads, 10)
    assert (ids == np.argsort(-wanted, axis=-1)[..., :10]).all()
    np.testing.assert_allclose(log_probs, -np.sort(-wanted, axis=-1)[..., :10], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dialect", ["medusa-1", "medusa-2", "modelopt", "vllm"])
def test_every_dialect_gives_the_same_head(dialect: str, pickled: bool, bundle: Path, tmp_path: Path) -> None:
    blocks, projections = random_blocks(), random_projections()
    folder = write_head(tmp_path / "head", tensors_of(dialect, blocks, projections), pickled=pickled)
    info = import_head(bundle, folder)
    assert (info.dialect, info.heads, info.name) == (dialect, HEADS, "medusa")
    assert_equals_reference(bundle, "medusa", blocks, [p.numpy() for p in projections])


def test_blockwise_heads_are_those_that_were_trained(bundle: Path, tmp_path: Path) -> None:
    """The graph against the module whose weights were saved."""
    from headstart.calibration.head_modules import FeedForwardBlock

    torch.manual_seed(0)
    heads = [[FeedForwardBlock(HIDDEN) for _ in range(LAYERS)] for _ in range(HEADS)]
    projections, tensors = random_projections(), {}
    for i, blocks in enumerate(heads):
        for j, block in enumerate(blocks):
            torch.nn.init.normal_(block.wo.weight, std=0.1)
            tensors |= {f"blockwise_heads.{i}.{j}.{name}": tensor for name, tensor in block.state_dict().items()}
        tensors[f"blockwise_heads.{i}.{LAYERS}.weight"] = projections[i]
    assert import_head(bundle, write_head(tmp_path / "head", tensors)).dialect == "blockwise"
    hidden = torch.randn(2, 1, HIDDEN)
    with torch.no_grad():
        states = [torch.nn.Sequential(*blocks)(hidden[:, 0]) for blocks in heads]
    logits = [state @ projection.T for state, projection in zip(states, projections, strict=True)]
    wanted = torch.stack(logits, 1).log_softmax(-1).topk(10)
    loaded = Bundle.load(bundle)
    ids, log_probs = proposals(loaded, "medusa", hidden.numpy())
    assert (ids == wanted.indices.numpy()).all()
    np.testing.assert_allclose(log_probs, wanted.values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama_tied", "llama"])
def test_blocks_alone_project_with_the_target_s_lm_head(architecture: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    from architectures import tiny_model

    bundle = Path(shutil.copytree(bundle_of(architecture).path, tmp_path / "bundle"))
    blocks = random_blocks()
    folder = write_head(tmp_path / "head", tensors_of("medusa-1", blocks, []))
    info = import_head(bundle, folder)
    assert list(info.shared) == ["lm_head"]
    lm_head = tiny_model(architecture).get_output_embeddings().weight.detach().numpy()
    assert_equals_reference(bundle, "medusa", blocks, [lm_head] * HEADS)
    stored = sum(file.stat().st_size for file in (bundle / "heads/medusa").iterdir())
    assert stored < 4 * (HEADS * LAYERS * HIDDEN * (HIDDEN + 1)) + 20_000, "the LM head was copied"


def test_medusa_2_inside_the_target_s_own_checkpoint(bundle: Path, tmp_path: Path) -> None:
    blocks, projections = random_blocks(), random_projections()
    others = {"model.embed_tokens.weight": torch.zeros(VOCAB, HIDDEN), "lm_head.weight": torch.zeros(VOCAB, HIDDEN)}
    folder = write_head(tmp_path / "head", {**others, **tensors_of("medusa-2", blocks, projections)})
    assert import_head(bundle, folder).dialect == "medusa-2"


def test_one_projection_for_all_in_vllm_s_form(bundle: Path, tmp_path: Path) -> None:
    blocks, projections = random_blocks(), random_projections()[:1]
    folder = write_head(tmp_path / "head", tensors_of("vllm", blocks, projections), {"original_lm_head": True})
    import_head(bundle, folder)
    assert_equals_reference(bundle, "medusa", blocks, [projections[0].numpy()] * HEADS)


@pytest.mark.parametrize("stored", ["lm_head.weight", "medusa_heads.lm_heads.0.weight"])
def test_original_lm_head_under_either_name_and_scaled(stored: str, bundle: Path, tmp_path: Path) -> None:
    blocks, projection = random_blocks(), random_projections()[0]
    tensors = {**tensors_of("vllm", blocks, []), stored: projection}
    import_head(bundle, write_head(tmp_path / "head", tensors, {"original_lm_head": True, "logit_scale": 0.5}))
    assert_equals_reference(bundle, "medusa", blocks, [0.5 * projection.numpy()] * HEADS)
    size = (bundle / "heads/medusa/head.onnx.data").stat().st_size
    assert size < 4 * (HEADS * LAYERS * HIDDEN * (HIDDEN + 1) + VOCAB * HIDDEN) + 20_000, "the one projection was copied"


@pytest.mark.parametrize("already_cut", [True, False])
def test_truncated_vocabulary_proposes_the_target_s_ids(already_cut: bool, bundle: Path, tmp_path: Path) -> None:
    blocks, projections = random_blocks(), random_projections()
    token_map = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(2))[:40]
    stored = [p[token_map].clone() if already_cut else p for p in projections]
    tensors = {**tensors_of("vllm", blocks, stored), "token_map": token_map}
    import_head(bundle, write_head(tmp_path / "head", tensors, {"truncated_vocab_size": 40, "vocab_size": VOCAB}))
    loaded = Bundle.load(bundle)
    hidden = np.random.default_rng(0).standard_normal((1, 1, HIDDEN)).astype(np.float32)
    ids, log_probs = proposals(loaded, "medusa", hidden)
    wanted = reference(hidden[:, 0], blocks, [p.numpy()[token_map] for p in projections])
    assert (ids == token_map.numpy()[np.argsort(-wanted, axis=-1)[..., :10]]).all()
    np.testing.assert_allclose(log_probs, -np.sort(-wanted, axis=-1)[..., :10], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
@pytest.mark.parametrize("quantized", [False, True])
def test_drafted_tokens_take_their_rows_of_the_target_s_lm_head(
    architecture: str, quantized: bool, bundle_of: BundleOf, tmp_path: Path
) -> None:
    """Also of an int8 bundle, whose LM head reads rotated states; the whole numbers are copied as they are."""
    from architectures import tiny_model

    blocks = random_blocks()
    token_map = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(2))[:40].sort().values
    bundle = tmp_path / "bundle"
    if quantized:
        quantize(bundle_of(architecture).path, bundle)
    else:
        shutil.copytree(bundle_of(architecture).path, bundle)
    info = import_head(bundle, write_head(tmp_path / "head", {**tensors_of("medusa-1", blocks, []), "token_map": token_map}))
    assert info.dialect == "medusa-1" and not info.shared
    hidden = np.random.default_rng(0).standard_normal((1, 1, HIDDEN)).astype(np.float32)
    ids, log_probs = proposals(Bundle.load(bundle), "medusa", hidden)
    rows = tiny_model(architecture).get_output_embeddings().weight.detach().numpy()[token_map]
    wanted = reference(hidden[:, 0], blocks, [rows] * HEADS)
    best = token_map.numpy()[np.argsort(-wanted, axis=-1)[..., :10]]
    assert (ids[..., 0] == best[..., 0]).all() and set(ids.ravel()) <= set(token_map.tolist())
    np.testing.assert_allclose(log_probs, -np.sort(-wanted, axis=-1)[..., :10], atol=0.2 if quantized else 1e-4)
    stored = ir.load(bundle / info.graph.file).graph.initializers["projection.weight"]
    assert stored.dtype == (ir.DataType.INT8 if quantized else ir.DataType.FLOAT)


def test_token_maps_that_cannot_be(bundle: Path, tmp_path: Path) -> None:
    cut = [p[:3].clone() for p in random_projections()]
    for name, ids in {"twice": [0, 1, 1], "beyond": [0, 1, VOCAB]}.items():
        tensors = {**tensors_of("vllm", random_blocks(), cut), "token_map": torch.tensor(ids)}
        with pytest.raises(HeadError, match=f"different tokens below {VOCAB}"):
            import_head(bundle, write_head(tmp_path / name, tensors))


def test_blocks_without_biases(bundle: Path, tmp_path: Path) -> None:
    blocks = [[(weight, torch.zeros(HIDDEN)) for weight, _ in head] for head in random_blocks()]
    tensors = {k: v for k, v in tensors_of("vllm", blocks, random_projections()).items() if not k.endswith("bias")}
    import_head(bundle, write_head(tmp_path / "head", tensors))
    assert_equals_reference(bundle, "medusa", blocks, [p.numpy() for p in random_projections()])


@pytest.mark.parametrize("config", [{"medusa_heads_type": "base_head", "medusa_num_heads": HEADS - 1}, {}])
def test_whisper_medusa_s_linear_heads(config: dict[str, Any], bundle: Path, tmp_path: Path) -> None:
    """Lossy as published, so that a flag must say so; head 0 speaks for the target itself and is no draft."""
    from architectures import tiny_model

    blocks = random_blocks()
    whisper = {"whisper_model.proj_out.weight": torch.zeros(VOCAB, HIDDEN)}
    folder = write_head(tmp_path / "head", {**whisper, **tensors_of("modelopt", blocks, [])}, config)
    with pytest.raises(HeadError, match=r"lossy as published.*head 0.*--lossy"):
        import_head(bundle, folder)
    info = import_head(bundle, folder, lossy=True)
    assert (info.dialect, info.heads) == ("whisper-medusa", HEADS - 1)
    lm_head = tiny_model("llama_tied").get_output_embeddings().weight.detach().numpy()
    assert_equals_reference(bundle, "medusa", blocks[1:], [lm_head] * (HEADS - 1), HEADS - 1)


def test_heads_of_another_target_are_refused(bundle: Path, tmp_path: Path) -> None:
    wrong_vocab = write_head(tmp_path / "v", tensors_of("medusa-1", random_blocks(), random_projections(vocab=310)))
    with pytest.raises(HeadError, match=r"onto 310 tokens.* 300"):
        import_head(bundle, wrong_vocab)
    small = [[(torch.zeros(32, 32), torch.zeros(32))]]
    with pytest.raises(HeadError, match="hidden size 32, the target has 64"):
        import_head(bundle, write_head(tmp_path / "h", tensors_of("medusa-1", small, [])))


def test_missing_pieces_are_named(bundle: Path, tmp_path: Path) -> None:
    tensors = tensors_of("medusa-1", random_blocks(), random_projections())
    without_projection = {k: v for k, v in tensors.items() if k != f"1.{LAYERS}.weight"}
    with pytest.raises(HeadError, match="head 1 has no projection"):
        import_head(bundle, write_head(tmp_path / "a", without_projection))
    without_head = {k: v for k, v in tensors.items() if not k.startswith("1.")}
    with pytest.raises(HeadError, match="head 1 is missing"):
        import_head(bundle, write_head(tmp_path / "b", without_head))


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (lambda key: key == "1.0.linear.bias", "bias of head 1, block 0 is missing"),
        (lambda key: ".1.linear" in key, "0.2.weight stands after 2 blocks, and 1 are there"),
        (lambda key: key.startswith("2.") and "linear" in key, "head 2 has no blocks"),
    ],
)
def test_what_a_lenient_loader_would_miss(gone: Callable[[str], bool], message: str, bundle: Path, tmp_path: Path) -> None:
    tensors = tensors_of("medusa-1", random_blocks(), random_projections())
    kept = {name: tensor for name, tensor in tensors.items() if not gone(name)}
    with pytest.raises(HeadError, match=message):
        import_head(bundle, write_head(tmp_path / "head", kept))


def test_shards(bundle: Path, tmp_path: Path) -> None:
    blocks, projections = random_blocks(), random_projections()
    tensors = tensors_of("medusa-2", blocks, projections)
    last = {name: tensor for name, tensor in tensors.items() if ".2." in name[:14]}
    folder = write_head(tmp_path / "head", {name: tensor for name, tensor in tensors.items() if name not in last})
    shards = {name: "second.safetensors" if name in last else "medusa_lm_head.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(HeadError, match=r"second\.safetensors is missing"):
        import_head(bundle, folder)
    save_file(last, folder / "second.safetensors")
    import_head(bundle, folder)
    assert_equals_reference(bundle, "medusa", blocks, [p.numpy() for p in projections])


def test_pickles_that_are_no_weights(bundle: Path, tmp_path: Path) -> None:
    folder = write_head(tmp_path / "head", tensors_of("medusa-1", random_blocks(), []))
    torch.save(Path("x"), folder / "training_args.bin")  # what a trainer leaves; weights_only refuses its classes
    assert import_head(bundle, folder).heads == HEADS
    torch.save([torch.zeros(2)], folder / "medusa_lm_head.pt")
    with pytest.raises(HeadError, match="it holds a list"):
        import_head(bundle, folder)


@pytest.mark.parametrize(
    ("name", "config", "family"),
    [
        ("midlayer.mlp.up_proj.weight", {}, "EAGLE-3"),
        ("fc.weight", {"dflash_config": {}}, "DFlash"),
        ("fc.weight", {}, "EAGLE"),
        ("layers.0.x", {"speculators_model_type": "eagle3"}, "vLLM speculators"),
        ("medusa_block.fc1.weight", {}, "Whisper-Medusa head of the block variant"),
        ("medusa_heads.0.0.linear.weight", {"medusa_heads_type": "medusa_block"}, "Whisper-Medusa head of the block variant"),
        ("layers.0.mlp.up_proj.weight", {"target_layer_ids": [1]}, "DFlash"),
        ("embed_layernorm.weight", {}, "HASS"),
        ("mask_hidden", {}, "P-EAGLE"),
        ("layers.0.self_attn.q_proj.weight", {}, "Kangaroo"),
    ],
)
def test_other_families_are_refused_by_name(name: str, config: dict[str, Any], family: str, tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=f"this is a {family}"):
        recognise(write_head(tmp_path / "head", {name: torch.zeros(2, 2)}, config))


def test_folders_that_hold_no_head(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match="not a folder"):
        recognise(tmp_path / "nothing")
    with pytest.raises(HeadError, match=r"found model\.embed"):
        recognise(write_head(tmp_path / "plain", {"model.embed_tokens.weight": torch.zeros(2, 2)}, {}))


@pytest.mark.parametrize("pickled", [False, True])
def test_truncated_files(pickled: bool, bundle: Path, tmp_path: Path) -> None:
    folder = write_head(tmp_path / "head", tensors_of("medusa-1", random_blocks(), []), pickled=pickled)
    file = next(f for f in folder.iterdir() if f.suffix != ".json")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = (bundle / "manifest.json").read_text()
    with pytest.raises(HeadError, match="cannot be read"):
        import_head(bundle, folder)
    assert (bundle / "manifest.json").read_text() == before
    assert not list(bundle.parent.glob(".bundle*")) and not (bundle / "heads").exists()


def test_names_and_force(bundle: Path, tmp_path: Path) -> None:
    folder = write_head(tmp_path / "head", tensors_of("medusa-1", random_blocks(), []))
    import_head(bundle, folder)
    assert import_head(bundle, folder).name == "medusa2"
    with pytest.raises(OutputError, match="--force"):
        import_head(bundle, folder, name="medusa")
    import_head(bundle, folder, name="medusa", force=True)
    assert sorted(Bundle.load(bundle).manifest.heads) == ["medusa", "medusa2"]


def test_decoding_with_imported_heads_changes_nothing(bundle: Path, tmp_path: Path) -> None:
    import_head(bundle, write_head(tmp_path / "head", tensors_of("medusa-1", random_blocks(), [])))
    model = load(bundle)
    assert model.drafters == ["medusa", "ngram"]
    prompts = ["abc", "hello there"]
    plain = model.generate(prompts, max_new_tokens=24, drafter="none")
    drafted = model.generate(prompts, max_new_tokens=24, drafter="medusa")
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    assert drafted[0].stats.drafted_tokens > 0


def contents(bundle: Path) -> dict[str, bytes]:
    return {str(file.relative_to(bundle)): file.read_bytes() for file in bundle.rglob("*") if file.is_file()}


@pytest.mark.parametrize("replacing", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_an_interrupted_import_changes_nothing(
    replacing: bool, late: bool, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_head(tmp_path / "first", tensors_of("medusa-1", random_blocks(), []))
    second = write_head(tmp_path / "second", tensors_of("medusa-1", random_blocks(), random_projections()))
    if replacing:
        import_head(bundle, first, name="medusa")
    before = contents(bundle)

    def interrupted(path: Path, manifest: Manifest) -> None:
        if late:
            write_manifest(path, manifest)
        raise KeyboardInterrupt

    monkeypatch.setattr(install, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_head(bundle, second, name="medusa", force=True)
    assert contents(bundle) == before
    assert (bundle / "heads").exists() == replacing
    assert not list(bundle.parent.glob(".bundle*"))
    Bundle.load(bundle)


def test_a_bundle_named_by_a_dot(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_head(tmp_path / "head", tensors_of("medusa-1", random_blocks(), []))
    monkeypatch.chdir(bundle)
    import_head(".", folder)
    import_head(".", folder, name="medusa", force=True)
    assert Bundle.load(".").manifest.heads == ("medusa",)


@pytest.mark.parametrize("name", ["auto", "none", "ngram", "source_copy", "previous_hypothesis", "draft_model"])
def test_names_of_other_drafters_are_refused(name: str, bundle: Path, tmp_path: Path) -> None:
    folder = write_head(tmp_path / "head", tensors_of("medusa-1", random_blocks(), []))
    with pytest.raises(HeadError, match="names another drafter"):
        import_head(bundle, folder, name=name)
    assert not (bundle / "heads").exists()


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a\\b", "a+b", "ngram+medusa", "a b", "1a", "für", ".", "x" * 65, "x" * 300]
)
def test_names_that_no_head_can_have(name: str, bundle: Path, tmp_path: Path) -> None:
    folder = write_head(tmp_path / "head", tensors_of("medusa-1", random_blocks(), []))
    with pytest.raises(HeadError, match="1 to 64 letters"):
        import_head(bundle, folder, name=name)
    assert not (bundle / "heads").exists() and not list(bundle.parent.glob(".bundle*"))


def test_the_longest_name(bundle: Path, tmp_path: Path) -> None:
    folder = write_head(tmp_path / "head", tensors_of("medusa-1", random_blocks(), []))
    assert import_head(bundle, folder, name="x" * 64).name == "x" * 64


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pickled", [True, False])
def test_weights_that_are_not_finite(value: float, pickled: bool, bundle: Path, tmp_path: Path) -> None:
    """One weight is enough, in a block or in a projection; importing and exporting refuse it alike."""
    for name in ("1.0.linear.weight", f"2.{LAYERS}.weight"):
        tensors = tensors_of("medusa-1", random_blocks(), random_projections())
        tensors[name][5, 7] = value
        folder = write_head(tmp_path / name, tensors, pickled=pickled)
        with pytest.raises(HeadError, match=rf"{name} holds NaN or infinite weights \(1 of "):
            import_head(bundle, folder)
    assert not (bundle / "heads").exists()


def toy_family(layers_read: tuple[int, ...], embeddings: bool = False) -> Family:
    """A family in one module: a folder with the tensor `toy` holds it; it proposes with Medusa's graph."""

    def to_graphs(folder: HeadFolder, dialect: str, target: Installation) -> HeadInfo:
        tensors = tensors_of("medusa-1", random_blocks(), [])
        return medusa.to_graphs(HeadFolder.open(write_head(target.folder / "medusa", tensors)), "medusa-1", target)

    return Family(
        lambda folder: Format("toy-1") if "toy" in folder.files else None,
        lambda folder, layers: Reads(aux_layers=tuple(i for i in layers_read if i <= layers), embeddings=embeddings),
        to_graphs,
    )


def test_what_a_head_reads_is_asked_before_tracing(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family is one line of the table: export returns the layers it reads, and the bundle names the family."""
    monkeypatch.setitem(families.FAMILIES, "toy", toy_family((0, 2, 9)))
    folder = write_head(tmp_path / "head", {"toy": torch.zeros(2)})
    bundle = export(checkpoint_of("llama_tied"), tmp_path / "bundle", [folder], aux_layers=[1])
    assert bundle.manifest.model.aux_layers == (1, 0, 2)
    outputs = {tensor.name: tensor.shape for tensor in bundle.manifest.graphs["decoder"].outputs}
    assert outputs[contract.AUX_HIDDEN][-1] == 3 * HIDDEN
    assert bundle.manifest.heads == ("toy",) and bundle.head("toy").family == "toy"


@pytest.mark.parametrize(
    ("family", "message"), [(toy_family((0, 2)), "--aux-layers 0,2"), (toy_family((), True), "embeddings")]
)
def test_heads_that_read_more_than_the_bundle_returns(
    family: Family, message: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families.FAMILIES, "toy", family)
    with pytest.raises(HeadError, match=message):
        import_head(bundle, write_head(tmp_path / "head", {"toy": torch.zeros(2)}))
    assert not (bundle / "heads").exists()


@pytest.mark.parametrize("damage", ["nan", "family"])
def test_exporting_with_a_head_that_cannot_be_taken(
    damage: str, checkpoint_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left at the output; another family is refused before the checkpoint is even read."""
    tensors = tensors_of("medusa-1", random_blocks(), [])
    tensors["0.0.linear.bias"][3] = float("nan")
    folder = write_head(tmp_path / "head", tensors if damage == "nan" else {"midlayer.mlp.up_proj.weight": torch.zeros(2, 2)})
    checkpoint = checkpoint_of("llama_tied") if damage == "nan" else tmp_path / "no-such-checkpoint"
    with pytest.raises(HeadError, match="NaN" if damage == "nan" else "EAGLE-3"):
        export(checkpoint, tmp_path / "bundle", [folder])
    assert not list(tmp_path.glob("*bundle*"))

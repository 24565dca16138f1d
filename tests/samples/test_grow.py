"""Growth changes the size of a checkpoint and its heads, and nothing that they compute."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from architectures import save_checkpoint, tiny_model
from safetensors.torch import load_file, save_file

from headstart.runtime.errors import CheckpointError

SCRIPT = Path(__file__).parent.parent.parent / "samples" / "bench" / "grow.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grow", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["grow"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_grown_model_computes_the_same(script: ModuleType, tmp_path: Path, name: str) -> None:
    small = tiny_model(name)
    save_checkpoint(small, tmp_path / "small")
    # 64 hidden, 96 neurons, 2 layers, 4 heads on 2 key/value heads of 16, each of them larger
    grown = script.grow(tmp_path / "small", script.Size(96, 128, 5, 9, 3, 32)).eval()
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        wanted, found = small(ids).logits, grown(ids).logits
    assert float((wanted - found).abs().max() / (wanted.max() - wanted.min())) < 1e-5
    assert sum(p.numel() for p in grown.parameters()) > 2 * sum(p.numel() for p in small.parameters())


def test_everything_added_is_at_work(script: ModuleType, tmp_path: Path) -> None:
    """Added layers must not be zeros throughout: their time and their value ranges are to be real."""
    save_checkpoint(tiny_model("llama"), tmp_path / "small")
    state = script.grow(tmp_path / "small", script.Size(96, 128, 4, 8, 2, 16)).state_dict()
    silent = [i for i in range(4) if not state[f"model.layers.{i}.self_attn.o_proj.weight"].any()]
    assert len(silent) == 2
    assert all(state[f"model.layers.{i}.mlp.up_proj.weight"].ne(0).float().mean() > 0.9 for i in range(4))


def test_grown_heads_propose_the_same(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "heads"
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {"0.0.linear.weight": torch.randn(8, 8), "0.0.linear.bias": torch.randn(8), "0.1.weight": torch.randn(20, 8)}
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 1}))
    script.grow_heads(folder, tmp_path / "grown", 8, 12)
    grown = load_file(tmp_path / "grown" / "medusa_lm_head.safetensors")

    def logits(weights: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        inner = hidden @ weights["0.0.linear.weight"].T + weights["0.0.linear.bias"]
        return (hidden + torch.nn.functional.silu(inner)) @ weights["0.1.weight"].T

    hidden = torch.randn(3, 8)
    padded = torch.nn.functional.pad(hidden, (0, 4))
    torch.testing.assert_close(logits(grown, padded), logits(tensors, hidden))


def test_bad_input(script: ModuleType, tmp_path: Path) -> None:
    save_checkpoint(tiny_model("gpt2"), tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="no Llama checkpoint: its model_type is 'gpt2'"):
        script.grow(tmp_path / "gpt2", script.SIZES["0.25b"])
    save_checkpoint(tiny_model("llama"), tmp_path / "llama")
    with pytest.raises(CheckpointError, match="growing only adds"):
        script.grow(tmp_path / "llama", script.Size(32, 128, 4, 8, 2, 16))
    with pytest.raises(CheckpointError, match="Head size 16 does not divide the target's 24"):
        script.grow(tmp_path / "llama", script.Size(96, 128, 4, 8, 2, 24))

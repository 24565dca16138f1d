"""Growth changes the size of a checkpoint and its heads, and nothing that they compute."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from architectures import save_checkpoint, tiny_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration

from headstart.runtime.errors import CheckpointError, HeadError, OptionError

SCRIPT = Path(__file__).parent.parent.parent / "samples" / "bench" / "grow.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grow", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["grow"] = module
    sys.path.insert(0, str(SCRIPT.parent))  # where Python itself looks when the script is run
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_grown_model_computes_the_same(script: ModuleType, tmp_path: Path, name: str) -> None:
    small = tiny_model(name)
    save_checkpoint(small, tmp_path / "small")
    # 64 hidden, 96 neurons, 2 layers, 4 heads on 2 key/value heads of 16, each of them larger
    grown = script.grow(tmp_path / "small", script.Size(96, 128, 5, 12, 3, 32)).eval()
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


def save_heads(folder: Path, hidden: int, own_projection: int | None = None) -> dict[str, torch.Tensor]:
    """One block of a random Medusa head; with `own_projection` a projection to that vocabulary beside it."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    tensors = {"0.0.linear.weight": torch.randn(hidden, hidden) * 0.2, "0.0.linear.bias": torch.randn(hidden)}
    if own_projection is not None:
        tensors["0.1.weight"] = torch.randn(own_projection, hidden)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    version = {} if own_projection is not None else {"version": "2"}  # "2" shares the target's LM head
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 1, "medusa_num_layers": 1, **version}))
    return tensors


def block(weights: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    inner = hidden @ weights["0.0.linear.weight"].T + weights["0.0.linear.bias"]
    return hidden + torch.nn.functional.silu(inner)


def shared_head_logits(model: LlamaForCausalLM, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.lm_head(block(weights, model.model(ids).last_hidden_state))


def relative(wanted: torch.Tensor, found: torch.Tensor) -> float:
    return float((wanted - found).abs().max() / (wanted.max() - wanted.min()))


def test_written_checkpoint_decodes_the_same_with_its_heads(script: ModuleType, tmp_path: Path) -> None:
    """Read back from the folder: greedy tokens, and heads that share the LM head (published version 2)."""
    small = tiny_model("llama_tied")
    save_checkpoint(small, tmp_path / "small")
    tensors = save_heads(tmp_path / "heads", 64)
    folder = tmp_path / "grown"
    folder.mkdir()
    script.write(tmp_path / "small", folder, script.Size(128, 160, 4, 16, 4, 32), tmp_path / "heads")
    grown = LlamaForCausalLM.from_pretrained(folder).eval()
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "small" / "tokenizer.json").read_bytes()
    heads = load_file(folder / "medusa" / "medusa_lm_head.safetensors")
    ids = torch.arange(3, 23)[None]
    assert relative(shared_head_logits(small, tensors, ids), shared_head_logits(grown, heads, ids)) < 1e-4
    greedy = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    assert torch.equal(small.generate(ids, **greedy), grown.generate(ids, **greedy))


@pytest.mark.parametrize("vocabulary", [8, 20])  # 8: as large as the hidden size, and still not padded
def test_own_projection_keeps_its_vocabulary(script: ModuleType, tmp_path: Path, vocabulary: int) -> None:
    tensors = save_heads(tmp_path / "heads", 8, own_projection=vocabulary)
    script.grow_heads(tmp_path / "heads", tmp_path / "grown", 8, 12)
    grown = load_file(tmp_path / "grown" / "medusa_lm_head.safetensors")
    hidden = torch.randn(3, 8)
    padded = torch.nn.functional.pad(hidden, (0, 4))
    torch.testing.assert_close(block(grown, padded) @ grown["0.1.weight"].T, block(tensors, hidden) @ tensors["0.1.weight"].T)


def test_float16_when_asked(script: ModuleType, tmp_path: Path) -> None:
    save_checkpoint(tiny_model("llama"), tmp_path / "small")
    for name, dtype in script.DTYPES.items():
        script.write(tmp_path / "small", tmp_path / name, script.Size(96, 128, 4, 8, 2, 16), None, dtype)
        assert load_file(tmp_path / name / "model.safetensors")["model.norm.weight"].dtype == dtype


def test_bad_input(script: ModuleType, tmp_path: Path) -> None:
    save_checkpoint(tiny_model("gpt2"), tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="cannot be grown: its model_type is 'gpt2', and llama, t5, whisper can"):
        script.family_of(tmp_path / "gpt2")
    save_checkpoint(tiny_model("llama"), tmp_path / "llama")
    with pytest.raises(CheckpointError, match="growing only adds"):
        script.grow(tmp_path / "llama", script.Size(32, 128, 4, 8, 2, 16))
    with pytest.raises(CheckpointError, match="Head size 16 does not divide the target's 24"):
        script.grow(tmp_path / "llama", script.Size(96, 128, 4, 8, 2, 24))
    with pytest.raises(OptionError, match="must be a multiple of 9, found 96"):
        script.Size(96, 128, 5, 9, 3, 32)


def test_what_growth_would_change_is_refused(script: ModuleType, tmp_path: Path) -> None:
    save_checkpoint(tiny_model("llama"), tmp_path / "llama")
    file = tmp_path / "llama" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "attention_bias": True}))
    with pytest.raises(CheckpointError, match="has biases"):
        script.grow(tmp_path / "llama", script.SIZES["0.25b"])
    file.write_text(json.dumps({**config, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}))
    with pytest.raises(CheckpointError, match="rotary type 'yarn'"):
        script.grow(tmp_path / "llama", script.SIZES["0.25b"])
    save_heads(tmp_path / "heads", 8)
    with pytest.raises(HeadError, match="hidden size is 64"):
        script.grow_heads(tmp_path / "heads", tmp_path / "grown", 64, 96)
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize("fault", ["gpt2", "missing", "no weights", "no heads"])
def test_command_leaves_nothing_half_written(
    script: ModuleType, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the user sees: one line, exit code 2, and neither the output nor a temporary folder."""
    source, output = tmp_path / "source", tmp_path / "out" / "grown"
    if fault != "missing":
        save_checkpoint(tiny_model("gpt2" if fault == "gpt2" else "llama"), source)
    if fault == "no weights":
        (source / "model.safetensors").unlink()
    monkeypatch.setitem(script.SIZES, "0.25b", script.Size(96, 128, 4, 8, 2, 16))
    heads = ["--heads", str(tmp_path / "nowhere")] if fault == "no heads" else []
    monkeypatch.setattr(sys, "argv", ["grow.py", str(source), "-o", str(output), *heads])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert "Fix: " in capsys.readouterr().err
    assert not output.parent.exists()


def encoder_decoder(kind: str) -> Any:
    """Tiny, with every number random: zeros and ones as norms and biases begin with would hide a mistake."""
    sizes = {"vocab_size": 300, "d_model": 24, "pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    if kind == "whisper":
        heads = {f"{half}_attention_heads": 2 for half in ("encoder", "decoder")}
        depth = {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 40, "decoder_ffn_dim": 32}
        limits = {"num_mel_bins": 20, "max_source_positions": 15, "max_target_positions": 40, "bos_token_id": 1}
        model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **depth, **limits))
    else:
        layout = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if kind == "flan_t5" else {}
        t5 = {"d_kv": 8, "d_ff": 40, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 3}
        model = T5ForConditionalGeneration(T5Config(**sizes, **t5, **layout))
        if kind == "flan_t5":
            model.lm_head.weight = torch.nn.Parameter(torch.randn(300, 24))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model.eval()


def size_of(*numbers: int) -> Any:
    return sys.modules["growth"].EncoderDecoderSize(*numbers)


def source_of(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "whisper":
        return {"input_features": torch.randn(2, 20, 30, generator=generator)}
    return {"input_ids": torch.randint(3, 300, (2, 9), generator=generator)}


def last_state(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the LM head reads, and so what heads read."""
    captured: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return captured[0]


@pytest.mark.parametrize("kind", ["t5", "flan_t5", "whisper"])
def test_grown_encoder_decoder_computes_the_same_with_its_heads(script: ModuleType, tmp_path: Path, kind: str) -> None:
    """More layers in both halves, more and wider heads; read back from the folder that was written."""
    small = encoder_decoder(kind)
    save_checkpoint(small, tmp_path / "small")
    if kind == "flan_t5":
        script.say_whether_scaled(small, tmp_path / "small" / "config.json")
    tensors = save_heads(tmp_path / "heads", 24)
    size = size_of(72, 64, 5, 4, 6, 12)
    (tmp_path / "grown").mkdir()
    script.write(tmp_path / "small", tmp_path / "grown", size, tmp_path / "heads")
    grown = type(small).from_pretrained(tmp_path / "grown").eval()
    inputs = {**source_of(kind), "decoder_input_ids": torch.arange(1, 25).reshape(2, 12)}
    heads = load_file(tmp_path / "grown" / "medusa" / "medusa_lm_head.safetensors")
    with torch.no_grad():
        assert relative(small(**inputs).logits, grown(**inputs).logits) < 1e-5
        wanted = small.get_output_embeddings()(block(tensors, last_state(small, inputs)))
        found = grown.get_output_embeddings()(block(heads, last_state(grown, inputs)))
    assert relative(wanted, found) < 1e-5
    assert sum(p.numel() for p in grown.parameters()) > 5 * sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize(("kind", "message"), [("t5", "hidden size is 24, the target's 16"), ("whisper", "does not divide")])
def test_encoder_decoders_that_do_not_fit(script: ModuleType, tmp_path: Path, kind: str, message: str) -> None:
    save_checkpoint(encoder_decoder(kind), tmp_path / "small")
    size = size_of(16, 64, 5, 4, 4, 12) if kind == "t5" else size_of(60, 64, 5, 4, 6, 10)
    with pytest.raises(CheckpointError, match=message):
        script.family_of(tmp_path / "small").grow(tmp_path / "small", size)

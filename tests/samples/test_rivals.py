"""The comparison of decoders: any decoder, classes of prompts, perplexity, and no draft model unless one is given."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "samples" / "bench"))  # where Python looks when it runs them

from measurement import Configuration, Pass
from rival_workers.protocol import _perplexity
from table import Truth, decoder, markdown
from task import InputError, Task, parser, task_from_arguments

WORDS = ["<bos>", "the", "a", "history", "of", "steam"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    facts = {"architectures": ["Gemma3ForCausalLM"], "vocab_size": len(WORDS), "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "model.safetensors").write_bytes(b"weights")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "the"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [{"prompt": f"the {word}", "class": kind} for kind in ("prose", "code") for word in WORDS[1:]]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def task_of(checkpoint: Path, data: Path, *options: str) -> Task:
    return task_from_arguments(parser().parse_args([str(checkpoint), "--data", str(data), "--prompts", "2", *options]))


def test_so_many_prompts_of_each_class(checkpoint: Path, data: Path) -> None:
    prompts = task_of(checkpoint, data).prompts
    assert [(prompt.kind, prompt.text) for prompt in prompts] == [
        ("prose", "the the"),
        ("prose", "the history"),
        ("code", "the the"),
        ("code", "the history"),
    ]
    assert prompts[1].token_ids == [0, 1, 3]


def test_without_a_draft_model_no_mode_has_one(checkpoint: Path, data: Path) -> None:
    alone, helped = task_of(checkpoint, data), task_of(checkpoint, data, "--draft", str(checkpoint))
    for name in ("openvino_genai/int8/draft k=5", "transformers_torch/fp32/assistant"):
        assert not alone.wants(name) and helped.wants(name)
    assert alone.wants("openvino_genai/int8/plain") and alone.draft is None


def test_windows_open_as_texts_do(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a history of steam " * 600)
    windows = task_of(checkpoint, data, "--text", str(tmp_path / "long.txt")).windows
    assert len(windows) == 8 and all(len(window) == 256 and window[0] == 0 for window in windows)
    assert [*windows[0][1:], *windows[1][1:]] == [2, 3, 4, 5] * 127 + [2, 3]
    (tmp_path / "short.txt").write_text("a history")
    with pytest.raises(InputError, match="has 2 tokens; 2040 are needed"):
        task_of(checkpoint, data, "--text", str(tmp_path / "short.txt"))


def test_what_is_no_decoder(checkpoint: Path, data: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"architectures": ["BartForConditionalGeneration"], "vocab_size": 6}))
    with pytest.raises(InputError, match=r"is BartForConditionalGeneration: this comparison is for \*ForCausalLM"):
        task_of(checkpoint, data)


def test_perplexity() -> None:
    """Of a model that gives the right token a half, and each of two others a quarter."""
    windows = [[0, 1, 2], [2, 0, 1, 1]]

    def logits(tokens: list[int]) -> np.ndarray:
        table = np.full((len(tokens), 3), math.log(0.25))
        for row, token in enumerate(tokens[1:]):
            table[row, token] = math.log(0.5)
        return table + 7

    assert _perplexity(logits, windows) == pytest.approx(2.0)


def test_classes_and_perplexity_are_columns() -> None:
    row = Configuration("rival", "Program", "int8", "plain", perplexity=17.25)
    row.passes.append(Pass([[1, 2, 3], [1, 2, 3]], [0.1, 0.1], [0.1, 0.05], [2, 2], 0.0))
    table = markdown([row], Truth(None), decoder(["prose", "code"], perplexity=True)).splitlines()
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (table[0], table[2])), strict=True))
    assert (cells["prose"], cells["code"], cells["perplexity"]) == ("20.0", "40.0", "17.25")
    assert "prose" not in decoder(["", ""], perplexity=False)

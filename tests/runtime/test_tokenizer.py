"""Streaming text: never half a character, never the beginning of a stop string, and in the end all of it."""

from pathlib import Path

import numpy as np
import pytest
from architectures import byte_tokenizer
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from headstart.runtime.errors import BundleError, OptionError, PromptError
from headstart.runtime.tokenizer import REPLACEMENT, TextStream, Tokenizer

TEXTS = ["héllo wörld", "日本語のテキスト と spaces", "emoji 🙂🙃 and 👩‍👩‍👧 joined", "tabs\tand\n\nlines  ", "plain"]


@pytest.fixture(scope="module", params=["bytes", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bytes":
        byte_tokenizer().save_pretrained(folder)
        return Tokenizer.load(folder)
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    fast = FastTokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("text", TEXTS)
def test_stream_equals_decoding_at_once(tokenizer: Tokenizer, text: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    ids = tokenizer.encode(text)
    stream, pieces, position = TextStream(tokenizer), [], 0
    while position < len(ids):
        size = int(generator.integers(1, 5)) if seed else 1
        pieces.append(stream.push(ids[position : position + size]))
        position += size
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_bytes_that_are_no_character_come_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂")[:-1]
    stream = TextStream(tokenizer)
    assert stream.push(ids).endswith("a")
    assert REPLACEMENT in stream.finish()


@pytest.mark.parametrize("group", [1, 3, 100])
def test_stop_strings_end_the_text_before_them(tokenizer: Tokenizer, group: int) -> None:
    ids = tokenizer.encode("one two END three")
    stream = TextStream(tokenizer, ["END", "nowhere"])
    text = "".join(stream.push(ids[i : i + group]) for i in range(0, len(ids), group)) + stream.finish()
    assert text == "one two " and stream.stopped
    assert "END" in tokenizer.decode(ids[: stream.token_count])
    assert "END" not in tokenizer.decode(ids[: stream.token_count - 1])


def test_what_only_looks_like_a_stop_string_is_shown_later(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["abcd"])
    ids = tokenizer.encode("x abc")
    assert "abc" not in stream.push(ids)
    assert stream.finish().endswith("abc") and not stream.stopped


def test_chat_template(tmp_path: Path) -> None:
    hf = byte_tokenizer()
    hf.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    hf.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    ours = Tokenizer.load(tmp_path)
    assert ours.apply_chat_template(messages) == hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    with pytest.raises(PromptError, match="no x"):
        ours.apply_chat_template([{"role": "x", "content": ""}])


def test_no_chat_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(OptionError, match="no chat template"):
        tokenizer.apply_chat_template([])


def test_broken_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)

"""Streaming text: never half a character, never the beginning of a stop string, and in the end all of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import byte_tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from headstart.runtime.errors import BundleError, OptionError, PromptError
from headstart.runtime.tokenizer import REPLACEMENT, TextStream, Tokenizer, check_tokens

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


def save_with_bos(folder: Path, template: str) -> Any:
    """A tokenizer whose post-processor begins every text with <s>, as Llama's does."""
    hf = byte_tokenizer()
    hf._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    hf.chat_template = template
    hf.save_pretrained(folder)
    return hf


@pytest.mark.parametrize("start", ["{{ bos_token }}", ""])
def test_a_conversation_has_the_special_tokens_of_its_template_only(tmp_path: Path, start: str) -> None:
    hf = save_with_bos(tmp_path, start + "{% for m in messages %}{{ m.content }}{% endfor %}")
    messages = [{"role": "user", "content": "hi"}]
    ours = Tokenizer.load(tmp_path)
    wanted = hf.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ours.encode(ours.apply_chat_template(messages)) == wanted
    assert ours.encode(str(ours.apply_chat_template(messages))) == wanted
    assert wanted.count(1) == bool(start)


def test_a_text_gets_one_bos(tmp_path: Path) -> None:
    save_with_bos(tmp_path, "")
    ours = Tokenizer.load(tmp_path)
    plain = ours.encode("hi")
    assert plain[0] == 1 and plain.count(1) == 1
    assert ours.encode("<s>hi") == plain
    assert ours.encode("<s>hi", special=False) == plain
    assert ours.encode("<s><s>hi").count(1) == 2  # the second one is the user's


TEMPLATES = {
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "tools": "{% if tools is not none %}T{{ tools }}{% endif %}{% if documents is not none %}D{% endif %}x",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "json_options": "{{ messages[0] | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}",
    "break": "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}",
    "special": "{{ eos_token }}{{ bos_token }}|{{ pad_token }}|{{ unk_token }}|{{ sep_token }}",
    "space": "{%- for m in messages %}\n  {{- m.content }}\n{%- endfor %}\n\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_render_as_in_transformers(tmp_path: Path, name: str) -> None:
    hf = save_with_bos(tmp_path, TEMPLATES[name])
    messages = [{"role": "user", "content": "hi <&> 'é'"}]
    wanted = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert Tokenizer.load(tmp_path).apply_chat_template(messages) == wanted


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{{ messages[0].content + 1 }}", "{% nonsense %}"])
def test_a_template_that_fails_is_one_error(tmp_path: Path, template: str) -> None:
    save_with_bos(tmp_path, template)
    with pytest.raises(PromptError, match="chat template refuses"):
        Tokenizer.load(tmp_path).apply_chat_template([{"role": "user", "content": "hi"}])


def test_the_default_of_several_chat_templates(tmp_path: Path) -> None:
    save_with_bos(tmp_path, "")
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.load(tmp_path).apply_chat_template([]) == "D"


@pytest.mark.parametrize("text", ["a\ud800b", "\udcff"])
def test_a_lone_surrogate_is_one_error(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(PromptError, match=r"character \d is the lone surrogate U\+D[8C]"):
        tokenizer.encode(text)


@pytest.mark.parametrize(("ids", "wrong"), [([1, 300], 300), ([-1], -1), ([299, 7, 9999], 9999)])
def test_tokens_outside_the_vocabulary_are_named(ids: list[int], wrong: int) -> None:
    check_tokens([0, 299], 300)
    with pytest.raises(PromptError, match=rf"Token {wrong} .* ids go from 0 to 299"):
        check_tokens(ids, 300)


def words(folder: Path) -> Tokenizer:
    """SentencePiece's way: a word's token begins with ▁, and decoding drops the first space."""
    pieces = ["<unk>", "<s>", "▁the", "▁cat", "▁", "s", "▁sat"]
    fast = FastTokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.add_special_tokens([AddedToken("<s>", special=True)])
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("prompt", "new", "text"),
    [([1, 2], [3, 5], " cats"), ([1, 2], [5], "s"), ([1], [3, 6], "cat sat"), ([], [3, 6], "cat sat"), ([2, 1], [3], " cat")],
)
def test_the_prompt_and_the_text_are_the_whole_text(tmp_path: Path, prompt: list[int], new: list[int], text: str) -> None:
    tokenizer = words(tmp_path)
    stream = TextStream(tokenizer, prompt_ids=prompt)
    assert "".join(stream.push([token]) for token in new) + stream.finish() == text
    assert tokenizer.decode(prompt) + text == tokenizer.decode(prompt + new)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_may_be_split_into_prompt_and_completion_anywhere(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for size in range(len(ids)):
        before = tokenizer.decode(ids[:size])
        if not before.endswith(REPLACEMENT):  # the prompt is text
            stream = TextStream(tokenizer, prompt_ids=ids[:size])
            assert before + stream.push(ids[size:]) + stream.finish() == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With a special token that ends a turn, which decoding leaves out, and one that it shows."""
    folder = tmp_path_factory.mktemp("chat")
    hf = byte_tokenizer()
    hf._tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<|im_start|>", special=True)])
    hf._tokenizer.add_tokens([AddedToken("<|shown|>", special=False)])
    hf.save_pretrained(folder)
    return Tokenizer.load(folder)


@pytest.mark.parametrize("group", [1, 2, 100])
@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [
        ("<|im_end|>", "one<|im_end|>two", "one"),
        ("<|shown|>", "one<|shown|>two", "one"),
        ("<|im_end|>\n", "one<|im_end|>x<|im_end|>\ntwo", "onex"),
        ("x<|im_end|>", "oneyxx<|im_end|>two", "oneyx"),
        ("<|im_end|><|im_start|>", "a<|im_end|><|im_end|><|im_start|>b", "a"),
        ("<|im_end|>", "🙂<|im_end|>🙂", "🙂"),
    ],
)
def test_a_stop_may_be_a_special_token(chat_tokenizer: Tokenizer, stop: str, text: str, shown: str, group: int) -> None:
    ids = chat_tokenizer.encode(text, special=False)
    stream = TextStream(chat_tokenizer, [stop, "nowhere"])
    assert "".join(stream.push(ids[i : i + group]) for i in range(0, len(ids), group)) + stream.finish() == shown
    end = chat_tokenizer.encode(stop, special=False)
    assert stream.stopped and ids[: stream.token_count][-len(end) :] == end


def test_a_special_stop_that_is_never_completed_hides_nothing(chat_tokenizer: Tokenizer) -> None:
    ids = chat_tokenizer.encode("one x<|im_end|>y x", special=False)
    stream = TextStream(chat_tokenizer, ["x<|im_end|>z"])
    assert "".join(stream.push([token]) for token in ids) == "one xy "
    assert stream.finish() == "x" and not stream.stopped and stream.token_count == len(ids)


def test_a_prompt_that_holds_the_stop_does_not_stop(chat_tokenizer: Tokenizer) -> None:
    prompt = chat_tokenizer.encode("x<|im_end|>", special=False)
    stream = TextStream(chat_tokenizer, ["<|im_end|>", "x<|im_end|>y"], prompt)
    assert stream.push(chat_tokenizer.encode("y", special=False)) == "y" and not stream.stopped


def test_broken_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)

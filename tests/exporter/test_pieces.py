"""tokenizer.json from SentencePiece models whose pieces a vocab.json numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.convert_slow_tokenizer import import_protobuf

from headstart.exporter.export import copy_tokenizer
from headstart.exporter.pieces import convert
from headstart.runtime.errors import CheckpointError
from headstart.runtime.tokenizer import Tokenizer

UNIGRAM, BPE = 1, 2
CONTROL, UNKNOWN = 3, 2
LETTERS = [(f"{letter}", -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]


def write_model(file: Path, kind: int, pieces: list[tuple[str, float]]) -> None:
    proto = import_protobuf().ModelProto()
    proto.trainer_spec.model_type = kind
    for piece, what in (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)):
        proto.pieces.add(piece=piece, score=0.0, type=what)
    for piece, score in pieces:
        proto.pieces.add(piece=piece, score=score)
    file.write_bytes(proto.SerializeToString())


def write_settings(folder: Path, numbers: list[str], **settings: Any) -> None:
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(numbers)}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_marian(tmp_path: Path) -> None:
    """The source model cuts, the joint vocabulary numbers, and the target's pieces come out as text."""
    words = [("▁", -4.0), ("▁the", -2.0), ("▁cat", -3.0), ("s", -3.5), *LETTERS]
    write_model(tmp_path / "source.spm", UNIGRAM, words)
    numbers = ["</s>", "<unk>", ">>fra<<", "▁chat", "▁cat", "▁the", "s", "▁", *"abcdefghijklmnopqr", *"tuvwxyz", "<pad>"]
    write_settings(tmp_path, numbers, tokenizer_class="MarianTokenizer")
    (tmp_path / "out").mkdir()
    copy_tokenizer(tmp_path, tmp_path / "out" / "tokenizer")
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    assert tokenizer.vocab_size == len(numbers)
    pieces = [numbers[i] for i in tokenizer.encode("the cats")]
    assert pieces == ["▁the", "▁cat", "s", "</s>"]
    assert tokenizer.decode([numbers.index(p) for p in ("▁the", "▁chat", "s", "</s>")]) == "the chats"
    assert [numbers[i] for i in tokenizer.encode("the ß")] == ["▁the", "▁", "<unk>", "</s>"]


def test_m2m_100(tmp_path: Path) -> None:
    """Byte-pair merges by score; language tokens stand behind vocab.json's, the source's before every text."""
    pieces = [("ab", 0.0), ("▁ab", -1.0), ("abc", -2.0), ("▁", -3.0), ("a", -4.0), ("b", -5.0), ("c", -6.0)]
    write_model(tmp_path / "sentencepiece.bpe.model", BPE, pieces)
    numbers = ["<s>", "<pad>", "</s>", "<unk>", "c", "b", "a", "▁", "abc", "▁ab", "ab"]
    write_settings(tmp_path, numbers, tokenizer_class="M2M100Tokenizer", src_lang="af")
    tokenizer = convert(tmp_path)
    ids = tokenizer.encode("abc ab").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["__af__", "▁ab", "c", "▁ab", "</s>"]
    assert ids[0] == len(numbers)  # the first of the language codes
    assert tokenizer.decode(ids) == "abc ab"


def test_separate_vocabularies_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "source.spm", UNIGRAM, LETTERS)
    write_settings(tmp_path, ["</s>", "<unk>"], separate_vocabs=True)
    with pytest.raises(CheckpointError, match="vocabularies of their own"):
        convert(tmp_path)

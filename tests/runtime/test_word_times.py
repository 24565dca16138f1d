"""Words' times: warping, words and punctuation by themselves; attention against transformers'; whole recordings."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from speech import RATE, SPEECH, random_whisper, recording, save_speech_checkpoint

import headstart
from headstart.exporter.export import export
from headstart.runtime.bundle import Bundle
from headstart.runtime.errors import CheckpointError, OptionError
from headstart.runtime.segments import Segment
from headstart.runtime.tokenizer import Tokenizer
from headstart.runtime.transcription import Transcript
from headstart.runtime.word_alignment import _keys, _queries
from headstart.runtime.word_times import Word, attended, split_words, token_starts, warped, with_punctuation, without_pauses
from headstart.transcribe import formatted

HEADS = [[0, 1], [1, 0], [1, 3]]
PROMPT = [770, 772, 776]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligned") / "checkpoint"
    save_speech_checkpoint(folder)
    name_heads(folder, HEADS)
    return folder


def name_heads(folder: Path, heads: list[list[int]]) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alignment_heads": heads}))


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    return export(checkpoint, checkpoint.parent / "bundle")


def cheapest(cost: np.ndarray) -> float:
    """By the recurrence, cell by cell."""
    total = np.full(cost.shape, np.inf)
    for i, j in itertools.product(*map(range, cost.shape)):
        before = [total[i - a, j - b] for a, b in ((1, 1), (1, 0), (0, 1)) if i >= a and j >= b]
        total[i, j] = cost[i, j] + (min(before) if before else 0)
    return float(total[-1, -1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (6, 1), (5, 40), (30, 12)])
def test_the_path_is_the_cheapest(shape: tuple[int, int]) -> None:
    cost = np.random.default_rng(0).standard_normal(shape)
    rows, columns = warped(cost)
    assert (rows[0], columns[0]) == (0, 0) and (rows[-1], columns[-1]) == (shape[0] - 1, shape[1] - 1)
    assert set(zip(np.diff(rows).tolist(), np.diff(columns).tolist(), strict=True)) <= {(1, 1), (1, 0), (0, 1)}
    assert cost[rows, columns].sum() == pytest.approx(cheapest(cost))


def test_tokens_begin_where_attention_moves_on() -> None:
    """Two heads, one of noise; three prompt rows whose attention does not matter."""
    starts = [4, 20, 31, 60]
    frames = np.arange(80)
    owner = np.searchsorted(starts, frames, side="right") - 1
    clean = 0.01 + (owner[None] == np.arange(4)[:, None])
    rng = np.random.default_rng(0)
    weights = np.stack(
        [np.vstack([rng.random((3, 80)), clean]), np.vstack([rng.random((3, 80)), clean + 0.3 * rng.random((4, 80))])]
    )
    found = token_starts(weights.astype(np.float32), 4)
    assert found[0] == 0 and np.abs(found[1:] - starts[1:]).max() <= 2


def test_attention_is_the_checkpoint_s(bundle: Bundle) -> None:
    model, samples = headstart.load(bundle.path), recording(4)
    tokens = [*PROMPT, 20, 300, 41, 42, 517]
    with model.generator.exclusive() as engine:
        features = engine.features(np.pad(samples, (0, 2 * RATE)))
        sources = engine.encode([features])
        heads = bundle.manifest.generation.alignment_heads
        found = attended(_queries(engine, sources, tokens, len(heads)), _keys(sources, heads), 300)
    whisper = random_whisper()
    whisper.config._attn_implementation = whisper.model.decoder.config._attn_implementation = "eager"
    with torch.no_grad():
        out = whisper(torch.from_numpy(features)[None], decoder_input_ids=torch.tensor([tokens]), output_attentions=True)
    wanted = np.stack([out.cross_attentions[layer][0, head].numpy() for layer, head in HEADS])
    assert heads == tuple(map(tuple, HEADS)) and found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "language", "words"),
    [
        (
            [" I", " sa", "id", ":", " “", "don", "'t", " go", ".", "”"],
            "en",
            [" I", " said", ":", " “don't", " go", ".", "”"],
        ),
        (["M", b"\xc3", b"\xbc", "ller", ",", " groß"], "de", ["Müller", ",", " groß"]),
        (["何年", b"\xe3\x81", b"\xa7", "す", "か", "。"], "ja", ["何年", "で", "す", "か", "。"]),
        ([], "en", []),
    ],
)
def test_words(tokens: list[str | bytes], language: str, words: list[str]) -> None:
    """Tokens may be parts of a character."""
    pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in tokens]

    def decode(ids: Sequence[int]) -> str:
        return b"".join(pieces[i] for i in ids).decode("utf-8", "replace")

    assert [decode(word) for word in split_words(range(len(pieces)), decode, language)] == words


def test_punctuation_belongs_to_words() -> None:
    said = [" I", " said", ":", " “", "don't", " go", ".", "”"]
    joined = with_punctuation([Word(i, i + 1, text) for i, text in enumerate(said)])
    assert [word.text for word in joined] == [" I", " said:", " “don't", " go.”"]
    assert [(word.start, word.end) for word in joined] == [(0, 1), (1, 2), (4, 5), (5, 6)]


def test_a_pause_is_no_part_of_a_word() -> None:
    words = [
        Word(0.0, 3.4, " Send"),
        Word(3.4, 3.6, " a"),
        Word(3.6, 3.9, " note"),
        Word(3.9, 3.9, " to"),
        Word(3.9, 4.1, " me"),
    ]
    assert [(round(word.start, 2), word.end) for word in without_pauses(words)] == [
        (2.9, 3.4),  # twice the median of 0.2, 0.2, 0.3 and 3.4
        (3.4, 3.6),
        (3.6, 3.9),
        (3.9, 3.9),
        (3.9, 4.1),
    ]
    assert without_pauses([Word(0, 9, " slow"), Word(9, 19, " words")])[1].start == pytest.approx(19 - 1.4)
    assert without_pauses([]) == []


@pytest.mark.parametrize("timestamps", [True, False])
def test_words_of_a_recording(bundle: Bundle, timestamps: bool) -> None:
    """Of several windows with timestamps; the words are the text, in order and within the recording."""
    seconds = 14 if timestamps else 5
    heard = headstart.load(bundle.path).transcribe(
        recording(seconds, 3), timestamps=timestamps, words=True, max_new_tokens=24, fallback=None
    )
    assert len(heard.segments) > timestamps
    words = [word for segment in heard.segments for word in segment.words]
    for segment in heard.segments:
        assert "".join(word.text for word in segment.words).strip() == segment.text
    assert all(0 <= word.start <= word.end <= seconds for word in words)
    for segment in heard.segments:
        assert all(a.start <= b.start for a, b in itertools.pairwise(segment.words))


def test_words_in_json() -> None:
    said = (Word(0.1, 0.5, " Hello,"), Word(0.6, 0.9, " you."))
    segment = Segment(0.1, 0.9, "Hello, you.", (1, 2), said)
    heard = Transcript("Hello, you.", (segment, Segment(1, 2, "And?")), "en", 2.0, (), (), {"en": 0.9, "de": 0.1})
    written = json.loads(formatted(heard, "json"))
    assert written["languages"] == {"en": 0.9, "de": 0.1}
    assert written["segments"] == [
        {
            "start": 0.1,
            "end": 0.9,
            "text": "Hello, you.",
            "words": [{"start": 0.1, "end": 0.5, "text": " Hello,"}, {"start": 0.6, "end": 0.9, "text": " you."}],
        },
        {"start": 1, "end": 2, "text": "And?"},
    ]


def test_bundles_without_alignment_heads_say_so(speech_bundle: Bundle) -> None:
    model = headstart.load(speech_bundle.path)
    with pytest.raises(OptionError, match=r"cannot tell words' times: its checkpoint names no alignment_heads"):
        model.transcribe(recording(1), words=True)


def test_heads_that_are_not_there(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "wrong")
    name_heads(tmp_path / "wrong", [[2, 0]])
    with pytest.raises(CheckpointError, match="names head 0 of layer 2; the decoder has 2 layers of 4 heads"):
        export(tmp_path / "wrong", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_sample_s_tokens_make_whole_words() -> None:
    tokenizer = Tokenizer.load(SPEECH)
    text = " Turn on the kitchen lights, please."
    words = split_words(tokenizer.encode(text, special=False), tokenizer.decode, "en")
    assert [tokenizer.decode(word) for word in words] == [" Turn", " on", " the", " kitchen", " lights", ",", " please", "."]

"""What the comparison of encoder-decoders decides by itself: items, figures and lengths. No rival is needed."""

import io
import json
import sys
import wave
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "samples" / "bench"))  # where Python looks when it runs them

from measurement import Configuration, Pass, Prompt, Worker, WorkerError
from preparation import Workshop, fingerprint
from quality import Quality
from rival_workers import ctranslate2, faster_whisper
from rival_workers.protocol import Setup, with_end
from rival_workers.recording import filled, samples_of
from rival_workers.transformers_seq2seq import without_start
from seq2seq_task import parser, task_from_arguments
from table import Truth, decoder, encoder_decoder, figures, markdown
from task import InputError, Task

from headstart.calibration.answers import exact_share

WORDS = ["</s>", "<start>", "<en>", "<transcribe>", "<silent>", "lights", "on", "off"]


def write_checkpoint(folder: Path, speech: bool = False, **config: Any) -> Path:
    """What a task reads of a checkpoint: no weights are loaded before there is a rival."""
    folder.mkdir()
    kind = "WhisperForConditionalGeneration" if speech else "T5ForConditionalGeneration"
    facts = {"architectures": [kind], "vocab_size": len(WORDS), **({"max_target_positions": 24} if speech else {}), **config}
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "model.safetensors").write_bytes(b"weights")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    if speech:
        (folder / "preprocessor_config.json").write_text(json.dumps({"chunk_length": 1}))
        rules = {"lang_to_id": {"<|de|>": 9, "<|en|>": 2}, "task_to_id": {"translate": 8, "transcribe": 3}}
        rules |= {"decoder_start_token_id": 1, "no_timestamps_token_id": 4}
        (folder / "generation_config.json").write_text(json.dumps(rules))
    return folder


def write_lines(file: Path, lines: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_wave(file: Path, seconds: float, rate: int = 16_000) -> None:
    with wave.open(str(file), "wb") as sound:
        sound.setsampwidth(2)
        sound.setnchannels(1)
        sound.setframerate(rate)
        sound.writeframes(b"\x00\x40" * int(seconds * rate))


def task_of(checkpoint: Path, data: Path, *options: str) -> Task:
    return task_from_arguments(
        parser().parse_args([str(checkpoint), "--draft", str(checkpoint), "--data", str(data), *options])
    )


def text_task(folder: Path, *options: str) -> Task:
    data = write_lines(folder / "data.jsonl", [{"prompt": f"lights {w}", "target": w} for w in ("on", "off", "on", "off")])
    return task_of(write_checkpoint(folder / "checkpoint"), data, "--items", "2", *options)


def speech_task(folder: Path, *durations_s: float, options: tuple[str, ...] = ()) -> Task:
    for i, duration_s in enumerate(durations_s):
        write_wave(folder / f"{i}.wav", duration_s)
    data = write_lines(folder / "data.jsonl", [{"audio": f"{i}.wav", "text": "on"} for i in range(len(durations_s))])
    return task_of(write_checkpoint(folder / "checkpoint", speech=True), data, "--items", "1", *options)


def test_texts_are_spread_and_have_targets(tmp_path: Path) -> None:
    task = text_task(tmp_path, "--new-tokens", "400")
    assert [prompt.token_ids for prompt in task.prompts] == [[5, 6], [5, 6]]
    assert task.ends and task.new_tokens == 400
    assert task.quality is not None and task.quality.of([[6, 0], [7, 0]]) == 0.5
    assert "faster_whisper" not in task.rivals


def test_recordings_longer_than_the_window_are_left_out(tmp_path: Path) -> None:
    task = speech_task(tmp_path, 1.5, 0.5)
    (prompt,) = task.prompts
    assert prompt.text == "1.wav" and Path(str(prompt.audio)).is_absolute()
    assert prompt.token_ids == [1, 2, 3, 4]  # start, English, transcribe, no timestamps
    assert task.new_tokens == 20  # 24 positions without them
    assert task.quality is not None and task.quality.of([[6, 7, 0]]) == 1.0  # one word too many of one


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "this comparison is for T5ForConditionalGeneration, Whisper"),
        ({"architectures": None}, "nothing it says"),
    ],
)
def test_other_architectures_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **config)
    with pytest.raises(InputError, match=message):
        task_of(checkpoint, tmp_path / "data.jsonl")


def test_a_draft_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    text, speech = write_checkpoint(tmp_path / "text"), write_checkpoint(tmp_path / "speech", speech=True)
    with pytest.raises(InputError, match=r"this comparison is for T5ForConditionalGeneration$"):
        task_from_arguments(parser().parse_args([str(text), "--draft", str(speech)]))


def test_data_without_targets_is_refused(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [{"prompt": "lights on"}])
    with pytest.raises(InputError, match="not JSON lines with prompt and target"):
        task_of(write_checkpoint(tmp_path / "checkpoint"), data)


def test_a_recording_at_another_rate_is_refused(tmp_path: Path) -> None:
    write_wave(tmp_path / "fast.wav", 0.5, rate=44_100)
    data = write_lines(tmp_path / "data.jsonl", [{"audio": "fast.wav", "text": "on"}])
    with pytest.raises(InputError, match="16 kHz"):
        task_of(write_checkpoint(tmp_path / "checkpoint", speech=True), data)


def test_samples_are_floats_below_one(tmp_path: Path) -> None:
    write_wave(tmp_path / "half.wav", 0.01)
    samples = samples_of(str(tmp_path / "half.wav"))
    assert samples.shape == (160,) and samples.dtype == "float32" and set(samples.tolist()) == {0.5}
    assert filled(samples, 200)[158:162].tolist() == [0.5, 0.5, 0, 0]
    assert len(filled(samples, 100)) == 160


def test_no_time_for_decoding_leaves_the_time_per_item() -> None:
    row = row_of("plain", [[5, 0]])
    row.passes[0].decode_s[:] = [-0.01]
    assert "| 90.0 | 90.0..90.0 | 100.0 | ? | 1.00 |" in markdown([row], Truth(None), encoder_decoder("WER"))


def row_of(mode: str, token_ids: list[list[int]], seconds: float = 0.1) -> Configuration:
    prefill_s, decode_s = [seconds] * len(token_ids), [seconds] * len(token_ids)
    one = Pass(token_ids, prefill_s, decode_s, [len(ids) - 1 for ids in token_ids], others_share=0.0)
    return Configuration("rival", "Program", "int8", mode, passes=[one])


def test_texts_of_unequal_length_are_compared() -> None:
    plain, draft = row_of("plain", [[5, 0], [6, 7, 0]]), row_of("draft", [[5, 0], [6, 0]])
    quality = Quality("exact", exact_share, ["5", "67"], lambda ids: "".join(map(str, ids[:-1])))
    truth = Truth([[5, 0], [6, 7, 8, 0]], quality)
    found = figures(draft, [plain, draft], truth)
    assert (found.equal_prompts, found.equal_to_reference, found.quality) == (1, 1, 0.5)
    assert found.agreement == (1 + 1 / 4) / 2
    assert figures(plain, [plain, draft], truth).quality == 1.0


def test_time_per_item_is_encoder_and_decoding() -> None:
    row = row_of("plain", [[5, 0], [6, 0]])
    row.passes += row_of("plain", [[5, 0], [6, 0]], seconds=0.3).passes + row_of("plain", [[5, 0], [6, 0]], 0.2).passes
    found = figures(row, [row], Truth(None))
    assert (found.item_ms_min, found.item_ms, found.item_ms_max) == pytest.approx((200, 400, 600))


def test_a_plain_mode_beside_one_that_failed_is_its_own_measure() -> None:
    failed = Configuration("rival", "Program", "int8", "plain", error="30 s are supposed")
    row = row_of("plain with its window", [[5, 0]])
    assert figures(row, [failed, row], Truth(None)).equal_prompts == 1


@pytest.mark.parametrize("columns", [decoder(["", ""], perplexity=False), encoder_decoder("WER")])
def test_every_line_of_the_table_has_as_many_cells(columns: Any) -> None:
    rows = [row_of("plain", [[5, 0]]), Configuration("rival", "Program", "int8", "draft", error="a | b")]
    lines = markdown(rows, Truth(None), columns).splitlines()
    assert {line.count("|") for line in lines} == {len(columns) + 5}
    assert "failed" in lines[3]


class Answering:
    """A process that answers with so many tokens."""

    def __init__(self, tokens: int) -> None:
        self.stdin = io.StringIO()
        self.stdout = io.StringIO(json.dumps({"token_ids": [5] * tokens}) + "\n")

    def kill(self) -> None:
        pass


@pytest.mark.parametrize(
    ("ends", "tokens", "fine"), [(True, 3, True), (True, 4, True), (True, 5, False), (True, 0, False), (False, 3, False)]
)
def test_only_texts_that_end_by_themselves_may_be_short(tmp_path: Path, ends: bool, tokens: int, fine: bool) -> None:
    worker = Worker("rival", Path("python"), Setup("model", None, "int8", 1, [], ends), tmp_path / "log")
    worker._process = Answering(tokens)  # type: ignore[assignment]
    if fine:
        assert len(worker.ask("plain", Prompt("on", [6]), 4)["token_ids"]) == tokens
    else:
        with pytest.raises(WorkerError, match=f"{tokens} tokens instead of 4"):
            worker.ask("plain", Prompt("on", [6]), 4)


def test_rules_of_generation_make_another_conversion(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", speech=True)
    before = fingerprint(checkpoint, ctranslate2.RIVAL)
    (checkpoint / "generation_config.json").write_text("{}")
    assert fingerprint(checkpoint, ctranslate2.RIVAL) != before


def test_faster_whisper_reads_what_was_converted_for_ctranslate2(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    shop = Workshop(tmp_path / "work", {}, 1)
    home = tmp_path / "work" / "models" / fingerprint(checkpoint, ctranslate2.RIVAL) / "ctranslate2-int8"
    home.mkdir(parents=True)
    assert shop.conversion(faster_whisper.RIVAL, checkpoint, "int8") == home


@pytest.mark.parametrize("tokens", [1, 2, 10, 124])
def test_ctranslate2_is_allowed_exactly_so_many_tokens(tokens: int) -> None:
    length, start = ctranslate2.length_of(tokens, 4), 4
    assert min(length // 2, length - (start - 1)) == tokens  # its own rule, as measured on 4.8.5


def test_a_shorter_text_has_ended() -> None:
    assert with_end([5], 0, 2) == with_end([5, 0], 0, 3) == [5, 0]
    assert with_end([5, 6], 0, 2) == [5, 6]
    assert with_end([], 0, 2) == [0]


def test_start_tokens_are_taken_off_where_they_are() -> None:
    assert without_start([1, 2, 5], [1, 2]) == without_start([5], [1, 2]) == [5]

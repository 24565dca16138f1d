"""What was asked of seq2seq_rivals.py, checked: a text-to-text or a speech checkpoint, and items that have targets."""

import argparse
import json
import wave
from pathlib import Path
from typing import Any

from measurement import Prompt
from preparation import say
from quality import Quality
from table import encoder_decoder
from task import (
    HERE,
    InputError,
    Task,
    add_common_options,
    bundles,
    check_checkpoint,
    check_common_options,
    check_patterns,
    lines_with,
    rivals_named,
    same_vocabulary,
    spread,
    tokenizer_of,
)

from headstart.calibration.answers import exact_share, word_error_rate

SAMPLES = HERE.parent / "checkpoints"
REFERENCE = "transformers_seq2seq"
TEXT, SPEECH = "T5ForConditionalGeneration", "WhisperForConditionalGeneration"
RIVALS = {
    TEXT: ("ctranslate2", "optimum_onnx", REFERENCE, "headstart_bundle"),
    SPEECH: ("faster_whisper", "ctranslate2", "optimum_onnx", REFERENCE, "headstart_bundle"),
}
DATA = {TEXT: SAMPLES / "normalise" / "held_out.jsonl", SPEECH: SAMPLES / "speech" / "recordings" / "texts.jsonl"}
QUALITIES = {TEXT: ("exact", exact_share), SPEECH: ("WER", word_error_rate)}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Time per item of one encoder-decoder in every program that runs it on a CPU.")
    add = made.add_argument
    add("checkpoint", type=Path, help="Hugging Face folder of a T5 or a Whisper")
    add("--draft", type=Path, help="checkpoint of the draft model, same vocabulary; without it no mode has one")
    add("--data", type=Path, metavar="FILE", help="JSON lines with prompt and target, or audio (16 bit, mono) and text")
    add("--items", type=int, default=10, help="so many of them, evenly spread (default: 10)")
    add("--new-tokens", type=int, default=128, help="at most so many for each item (default: 128, or what the model takes)")
    add_common_options(made)
    return made


def task_from_arguments(arguments: argparse.Namespace) -> Task:
    """Everything the user gave, checked."""
    kind = check_checkpoint(arguments.checkpoint, tuple(RIVALS))
    if arguments.draft:
        check_checkpoint(arguments.draft, (kind,))
    check_common_options(arguments)
    config = same_vocabulary(arguments.checkpoint, arguments.draft)
    rivals = rivals_named(RIVALS[kind])
    check_patterns([*arguments.only, *arguments.skip], rivals)
    data = arguments.data or DATA[kind]
    prompts, targets = (_recordings if kind == SPEECH else _texts)(data, arguments.items, arguments.checkpoint)
    name, measure = QUALITIES[kind]
    tokenizer = tokenizer_of(arguments.checkpoint)
    return Task(
        rivals=rivals,
        reference=REFERENCE,
        columns=encoder_decoder(name),
        checkpoint=arguments.checkpoint,
        draft=arguments.draft,
        bundles=bundles(arguments.headstart, arguments.headstart_draft, arguments.checkpoint),
        prompts=prompts,
        new_tokens=_room(config, arguments.new_tokens, prompts),
        threads=arguments.threads,
        only=arguments.only,
        skip=arguments.skip,
        ends=True,
        quality=Quality(name, measure, targets, tokenizer.decode),  # which leaves special tokens out
    )


def _texts(file: Path, count: int, checkpoint: Path) -> tuple[list[Prompt], list[str]]:
    lines = spread(lines_with(file, "prompt", "target"), count, "--items", file)
    tokenizer = tokenizer_of(checkpoint)
    return [Prompt(line["prompt"], tokenizer.encode(line["prompt"]).ids) for line in lines], [line["target"] for line in lines]


def _recordings(file: Path, count: int, checkpoint: Path) -> tuple[list[Prompt], list[str]]:
    """Of those that fit the model's window: longer ones are cut differently by every program."""
    window_s = _json(checkpoint, "preprocessor_config.json")["chunk_length"]
    found = lines_with(file, "audio", "text")
    lines = [line for line in found if _duration_s(file.parent / line["audio"]) <= window_s]
    if len(lines) < len(found):
        say(f"{len(found) - len(lines)} recordings are longer than the window of {window_s} s and left out")
    start = decoder_start(_json(checkpoint, "generation_config.json"))
    chosen = spread(lines, count, "--items", file)
    prompts = [Prompt(line["audio"], start, str((file.parent / line["audio"]).resolve())) for line in chosen]
    return prompts, [line["text"] for line in chosen]


def decoder_start(generation: dict[str, Any]) -> list[int]:
    """What Whisper's decoder starts from: start, English or the one language there is, transcribe, no timestamps."""
    languages = generation.get("lang_to_id") or {}
    language = [languages.get("<|en|>", next(iter(languages.values())))] if languages else []
    task = [generation["task_to_id"]["transcribe"]] if generation.get("task_to_id") else []
    return [generation["decoder_start_token_id"], *language, *task, generation["no_timestamps_token_id"]]


def _room(config: dict[str, Any], wanted: int, prompts: list[Prompt]) -> int:
    """New tokens within the positions a Whisper has; a T5 has no end of them."""
    positions = config.get("max_target_positions")
    return min(wanted, positions - len(prompts[0].token_ids)) if positions else wanted


def _duration_s(file: Path) -> float:
    try:
        with wave.open(str(file)) as sound:
            if (sound.getsampwidth(), sound.getnchannels(), sound.getframerate()) != (2, 1, 16_000):
                raise InputError(f"{file} is not 16 bit, mono, 16 kHz: this comparison leaves converting out")
            return sound.getnframes() / sound.getframerate()
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(f"{file} is not a WAV file ({error})") from error


def _json(checkpoint: Path, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads((checkpoint / name).read_text("utf-8")))
    except OSError as error:
        raise InputError(f"{checkpoint} has no {name}: a speech model needs it") from error

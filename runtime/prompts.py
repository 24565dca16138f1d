"""Files of prompts: plain text with one prompt a line, or JSON Lines with a "prompt" (or "text", or "audio") in each object.

Each object may also have the expected output: a "target", or the "text" of an "audio".
"""

import json
from collections.abc import Sequence
from pathlib import Path

from .errors import PromptError

KEYS = ("prompt", "text")


def read_prompts(file: str | Path) -> list[str]:
    """The prompts, in order. Raises PromptError for a missing, empty or malformed file; the message names the line."""
    file = Path(file)
    lines = _lines(file)
    if file.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_prompt_of(file, number, line) for number, line in lines]


def read_inputs(file: str | Path) -> list[str | Path]:
    """As `read_prompts`; where a JSON object has an "audio", that recording's path, written relative to the file's folder."""
    file = Path(file)
    if file.suffix != ".jsonl":
        return list(read_prompts(file))
    return [_recording_of(file, number, line) or _prompt_of(file, number, line) for number, line in _lines(file)]


def read_answers(file: str | Path) -> list[tuple[str | Path, str | None]]:
    """As `read_inputs`, each with its expected output: its "target", or the "text" of an "audio"; else None."""
    file = Path(file)
    inputs = read_inputs(file)
    if file.suffix != ".jsonl":
        return [(given, None) for given in inputs]
    records = zip(inputs, _lines(file), strict=True)
    return [
        (given, text_of(line, ("target", "text") if isinstance(given, Path) else ("target",))) for given, (_, line) in records
    ]


def read_prompt_classes(file: str | Path) -> dict[str, list[str | Path]]:
    """The inputs by the "class" that each JSON object names; where it names none, by the file's own name."""
    file = Path(file)
    inputs = read_inputs(file)
    classes: dict[str, list[str | Path]] = {}
    for (_, line), given in zip(_lines(file), inputs, strict=True):
        name = json.loads(line).get("class", file.stem) if file.suffix == ".jsonl" else file.stem
        classes.setdefault(str(name), []).append(given)
    return classes


def _lines(file: Path) -> list[tuple[int, str]]:
    """(number, line) of those that are not blank."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file} cannot be read as UTF-8 text ({error}).") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise PromptError(f"{file} has no prompt: at least one line must not be blank.")
    return numbered


def _recording_of(file: Path, number: int, line: str) -> Path | None:
    name = _text_at(file, number, line, ("audio",))
    return None if name is None else file.parent / name


def _prompt_of(file: Path, number: int, line: str) -> str:
    text = _text_at(file, number, line, KEYS)
    if text is None:
        raise PromptError(f'{file} line {number}: an object with a text under "prompt" is required, found {line[:60]!r}.')
    return text


def _text_at(file: Path, number: int, line: str, keys: Sequence[str]) -> str | None:
    try:
        return text_of(line, keys)
    except ValueError as error:
        raise PromptError(f"{file} line {number} is not JSON ({error}).") from error


def text_of(line: str, keys: Sequence[str]) -> str | None:
    """The text under the first of `keys` that a JSON line's object has; None without one. Raises ValueError for other text."""
    record = json.loads(line)
    texts = [record[key] for key in keys if isinstance(record.get(key), str)] if isinstance(record, dict) else []
    return texts[0] if texts else None

"""Files of prompts: plain text with one prompt a line, or JSON Lines with a "prompt" (or "text") in each object."""

import json
from collections.abc import Sequence
from pathlib import Path

from .errors import PromptError

KEYS = ("prompt", "text")


def read_prompts(file: str | Path) -> list[str]:
    """The prompts, in order. Raises PromptError for a missing, empty or malformed file; the message names the line."""
    file = Path(file)
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file} cannot be read as UTF-8 text ({error}).") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise PromptError(f"{file} holds no prompt: at least one line that is not blank is needed.")
    if file.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_of(file, number, line) for number, line in numbered]


def read_prompt_classes(file: str | Path) -> dict[str, list[str]]:
    """The prompts by the "class" that each JSON object names; where it names none, by the file's own name."""
    file = Path(file)
    texts = read_prompts(file)
    classes: dict[str, list[str]] = {}
    lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    for line, text in zip(lines, texts, strict=True):
        name = json.loads(line).get("class", file.stem) if file.suffix == ".jsonl" else file.stem
        classes.setdefault(str(name), []).append(text)
    return classes


def _prompt_of(file: Path, number: int, line: str) -> str:
    try:
        text = text_of(line, KEYS)
    except ValueError as error:
        raise PromptError(f"{file} line {number} is not JSON ({error}).") from error
    if text is None:
        raise PromptError(f'{file} line {number}: an object with a text under "prompt" is needed, found {line[:60]!r}.')
    return text


def text_of(line: str, keys: Sequence[str]) -> str | None:
    """The text under the first of `keys` that a JSON line's object has; None without one. Raises ValueError for no JSON."""
    record = json.loads(line)
    texts = [record[key] for key in keys if isinstance(record.get(key), str)] if isinstance(record, dict) else []
    return texts[0] if texts else None

"""What was asked for: the command line of a comparison, checked before anything is prepared."""

import argparse
import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from measurement import Prompt
from quality import Quality
from rival_workers.protocol import Rival
from table import Columns, decoder

HERE = Path(__file__).parent
WEIGHTS = "model.safetensors"
PYCODE = HERE.parent / "checkpoints" / "pycode"
RIVALS = ("onnxruntime_genai", "openvino_genai", "llama_cpp", "transformers_torch", "headstart_bundle")


DRAFTING = ("draft", "assistant")  # how modes are called that draft with a model
WINDOW = 256  # tokens of a window of the text whose perplexity is measured
WINDOWS = 8


class InputError(Exception):
    """Something the user gave is wrong; the message is one line."""


@dataclass(frozen=True)
class Task:
    """What was asked for.

    Attributes:
        rivals: workers by name.
        reference: the one whose plain fp32 decoding the others are compared with.
        ends: whether the end token ends a text; otherwise each has `new_tokens`.
        draft: None where no mode drafts with a model.
        quality: where the prompts have targets.
        windows: of token ids, whose perplexity is measured; none where texts have targets.
    """

    rivals: Mapping[str, Rival]
    reference: str
    columns: Columns
    checkpoint: Path
    draft: Path | None
    bundles: dict[str, tuple[Path, Path | None]]
    prompts: list[Prompt]
    new_tokens: int
    threads: int
    only: list[str]
    skip: list[str]
    ends: bool = False
    quality: Quality | None = None
    windows: tuple[list[int], ...] = ()

    def wants(self, name: str) -> bool:
        """Whether "rival/weights/mode", or a beginning of it, is selected."""
        if self.draft is None and name.split("/")[-1].startswith(DRAFTING):
            return False
        chosen = not self.only or any(_matches(name, pattern) for pattern in self.only)
        return chosen and not any(fnmatch(name, pattern) or fnmatch(name, f"{pattern}/*") for pattern in self.skip)


def parser() -> argparse.ArgumentParser:
    """The options of rivals.py."""
    made = argparse.ArgumentParser(description="Decode speed of one checkpoint in every program that runs it on a CPU.")
    add = made.add_argument
    add("checkpoint", type=Path, nargs="?", default=PYCODE, help="Hugging Face folder of a decoder (default: pycode)")
    add("--draft", type=Path, help="checkpoint of the draft model, same vocabulary; without it no mode has one")
    add(
        "--data",
        type=Path,
        default=PYCODE / "held_out_prompts.jsonl",
        help='JSON lines with "prompt", and "class" if they have it',
    )
    add("--prompts", type=int, default=8, help="so many of each class, evenly spread (default: 8)")
    add("--text", type=Path, metavar="FILE", help="text whose perplexity each program is asked for, where it tells logits")
    add("--new-tokens", type=int, default=128, help="exactly so many for each prompt (default: 128)")
    add_common_options(made)
    return made


def add_common_options(made: argparse.ArgumentParser) -> None:
    """Those of every comparison."""
    add = made.add_argument
    add("--rounds", type=int, default=5, help="default: 5")
    add("--threads", type=int, default=2, help="of each program (default: 2)")
    add("--headstart", action="append", default=[], metavar="LABEL=BUNDLE", help="repeatable")
    add("--headstart-draft", type=Path, metavar="BUNDLE", help="bundle of the draft model, one more mode of each bundle")
    add("--only", action="append", default=[], metavar="RIVAL[/WEIGHTS[/MODE]]", help="repeatable; * is allowed")
    add("--skip", action="append", default=[], metavar="RIVAL[/WEIGHTS[/MODE]]", help="repeatable; * is allowed")
    add("--work", type=Path, default=HERE / ".work", help="environments, conversions, logs (default: samples/bench/.work)")
    add("--python", action="append", default=[], metavar="RIVAL=PYTHON", help="use this interpreter; repeatable")
    add("--prepare-only", action="store_true", help="make environments and conversions, measure nothing")
    add("--fresh", action="store_true", help="start each worker again for each pass (least memory)")
    add("--json", type=Path, metavar="FILE", help="everything measured, rewritten after each round")


def rivals_named(names: tuple[str, ...]) -> dict[str, Rival]:
    """What the worker files say of themselves."""
    return {name: importlib.import_module(f"rival_workers.{name}").RIVAL for name in names}


def task_from_arguments(arguments: argparse.Namespace) -> Task:
    """Everything the user of rivals.py gave, checked."""
    for checkpoint in (arguments.checkpoint, *([arguments.draft] if arguments.draft else [])):
        check_checkpoint(checkpoint, ("*ForCausalLM",))
    check_common_options(arguments)
    config = same_vocabulary(arguments.checkpoint, arguments.draft)
    prompts = _prompts(arguments.data, arguments.prompts, arguments.checkpoint)
    longest = max(len(prompt.token_ids) for prompt in prompts) + arguments.new_tokens
    if longest > config["max_position_embeddings"]:
        raise InputError(f"prompt and new tokens are up to {longest}, the model takes {config['max_position_embeddings']}")
    rivals = rivals_named(RIVALS)
    check_patterns([*arguments.only, *arguments.skip], rivals)
    return Task(
        rivals=rivals,
        reference="transformers_torch",
        columns=decoder([prompt.kind for prompt in prompts], bool(arguments.text)),
        checkpoint=arguments.checkpoint,
        draft=arguments.draft,
        bundles=bundles(arguments.headstart, arguments.headstart_draft, arguments.checkpoint),
        prompts=prompts,
        new_tokens=arguments.new_tokens,
        threads=arguments.threads,
        only=arguments.only,
        skip=arguments.skip,
        windows=_windows(arguments.text, arguments.checkpoint) if arguments.text else (),
    )


def check_common_options(arguments: argparse.Namespace) -> None:
    """Numbers, and the place of the report."""
    if arguments.new_tokens < 2 or arguments.rounds < 1 or arguments.threads < 1:
        raise InputError("--new-tokens must be at least 2, --rounds and --threads at least 1")
    if arguments.json and not arguments.json.parent.is_dir():
        raise InputError(f"{arguments.json.parent} is no folder to write a report to")


def same_vocabulary(checkpoint: Path, draft: Path | None) -> dict[str, Any]:
    """The checkpoint's configuration, once the draft model is known to have as many tokens."""
    config, drafts = (json.loads((folder / "config.json").read_text("utf-8")) for folder in (checkpoint, draft or checkpoint))
    if config["vocab_size"] != drafts["vocab_size"]:
        raise InputError(f"{draft} has {drafts['vocab_size']} tokens, the checkpoint {config['vocab_size']}")
    return dict(config)


def check_checkpoint(folder: Path, architectures: tuple[str, ...]) -> str:
    """Its architecture, which one of the patterns must name."""
    for name in ("config.json", "tokenizer.json", WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}: give a Hugging Face checkpoint with its weights in one file")
    family = json.loads((folder / "config.json").read_text("utf-8")).get("architectures") or ["nothing it says"]
    if not any(fnmatch(family[0], pattern) for pattern in architectures):
        raise InputError(f"{folder} is {family[0]}: this comparison is for {', '.join(architectures)}")
    return str(family[0])


def _prompts(file: Path, count: int, checkpoint: Path) -> list[Prompt]:
    """So many prompts of each class, evenly spread over the file."""
    tokenizer = tokenizer_of(checkpoint)
    lines = lines_with(file, "prompt", optional="class")
    kinds = dict.fromkeys(line["class"] for line in lines)
    chosen = [line for kind in kinds for line in spread([x for x in lines if x["class"] == kind], count, "--prompts", file)]
    return [Prompt(line["prompt"], tokenizer.encode(line["prompt"]).ids, kind=line["class"]) for line in chosen]


def _windows(file: Path, checkpoint: Path) -> tuple[list[int], ...]:
    """Consecutive windows from the beginning of the text, each opened as the tokenizer opens a text."""
    try:
        encoded = tokenizer_of(checkpoint).encode(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text ({error})") from error
    special = encoded.special_tokens_mask
    opening = encoded.ids[: special.index(0)]
    tokens = [token for token, added in zip(encoded.ids, special, strict=True) if not added]
    size = WINDOW - len(opening)
    if len(tokens) < WINDOWS * size:
        raise InputError(f"{file} has {len(tokens)} tokens; {WINDOWS * size} are needed")
    return tuple([*opening, *tokens[i * size : (i + 1) * size]] for i in range(WINDOWS))


def lines_with(file: Path, *fields: str, optional: str = "") -> list[dict[str, Any]]:
    """JSON lines that have those fields, and one that is empty where it is missing."""
    if not file.is_file():
        raise InputError(f"{file} is not there")
    try:
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
        also = [{optional: str(line.get(optional, ""))} if optional else {} for line in lines]
        return [{field: line[field] for field in fields} | more for line, more in zip(lines, also, strict=True)]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not JSON lines with {' and '.join(fields)} ({error!r})") from error


def spread(lines: list[dict[str, Any]], count: int, option: str, file: Path) -> list[dict[str, Any]]:
    """So many, evenly spread."""
    if not 1 <= count <= len(lines):
        raise InputError(f"{option} must be from 1 to {len(lines)}, the number in {file}")
    return [lines[i * len(lines) // count] for i in range(count)]


def tokenizer_of(checkpoint: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


def bundles(given: list[str], draft: Path | None, checkpoint: Path) -> dict[str, tuple[Path, Path | None]]:
    """By label: the bundle, and that of the draft model."""
    found: dict[str, tuple[Path, Path | None]] = {}
    for label, path in map(pair, given):
        if label in found:
            raise InputError(f"--headstart {label} is given twice")
        source = _source(Path(path))
        if draft:
            _source(draft)
        with (checkpoint / WEIGHTS).open("rb") as file:
            if source not in (None, hashlib.file_digest(file, "sha256").hexdigest()):
                raise InputError(f"{path} was exported from other weights than {checkpoint / WEIGHTS}")
        found[label] = (Path(path), draft)
    return found


def _source(bundle: Path) -> str | None:
    """The hash of the weights a bundle was exported from, None where it does not say."""
    manifest = bundle / "manifest.json"
    if not manifest.is_file():
        raise InputError(f"{bundle} is no bundle: it has no manifest.json")
    source = json.loads(manifest.read_text("utf-8")).get("provenance", {}).get("source_sha256", {})
    return source.get(WEIGHTS)


def pythons_from(given: list[str], rivals: Mapping[str, Rival]) -> dict[str, Path]:
    """Interpreters that stand in for environments of our own."""
    pythons = {name: Path(path) for name, path in map(pair, given)}
    for name, path in pythons.items():
        if name not in rivals or not path.is_file():
            raise InputError(f"--python {name}={path}: no such rival or no such interpreter. Rivals: {', '.join(rivals)}")
    return pythons


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise InputError(f"{text!r} is not NAME=VALUE")
    return name, value


def check_patterns(patterns: list[str], rivals: Mapping[str, Rival]) -> None:
    """Each must begin with a rival."""
    for pattern in patterns:
        rival = pattern.split("/")[0]
        if not any(fnmatch(name, rival) for name in rivals):
            raise InputError(f"{pattern!r} names no rival. Choose from: {', '.join(rivals)}")


def _matches(name: str, pattern: str) -> bool:
    """Whether a name agrees with a pattern as far as both go: "a/int8" with "a", and with "a/int8/plain"."""
    return all(fnmatch(part, wanted) for part, wanted in zip(name.split("/"), pattern.split("/"), strict=False))

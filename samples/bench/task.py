"""What was asked for: the command line of rivals.py, checked before anything is prepared."""

import argparse
import hashlib
import importlib
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from measurement import Prompt
from rival_workers.protocol import Rival

HERE = Path(__file__).parent
WEIGHTS = "model.safetensors"
PYCODE = HERE.parent / "checkpoints" / "pycode"
NAMES = ("onnxruntime_genai", "openvino_genai", "llama_cpp", "transformers_torch", "headstart_bundle")
RIVALS: dict[str, Rival] = {name: importlib.import_module(f"rival_workers.{name}").RIVAL for name in NAMES}


class InputError(Exception):
    """Something the user gave is wrong; the message is one line."""


@dataclass(frozen=True)
class Task:
    """What was asked for."""

    checkpoint: Path
    draft: Path
    bundles: dict[str, tuple[Path, Path | None]]
    prompts: list[Prompt]
    new_tokens: int
    threads: int
    only: list[str]
    skip: list[str]

    def wants(self, name: str) -> bool:
        """Whether "rival/weights/mode", or a beginning of it, is selected."""
        chosen = not self.only or any(_matches(name, pattern) for pattern in self.only)
        return chosen and not any(fnmatch(name, pattern) or fnmatch(name, f"{pattern}/*") for pattern in self.skip)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Decode speed of one checkpoint in every program that runs it on a CPU.")
    add = made.add_argument
    add("checkpoint", type=Path, nargs="?", default=PYCODE, help="Llama-shaped Hugging Face folder (default: pycode)")
    add("--draft", type=Path, default=PYCODE, help="checkpoint of the draft model, same vocabulary (default: pycode)")
    add("--data", type=Path, default=PYCODE / "held_out_prompts.jsonl", help='JSON lines with a field "prompt"')
    add("--prompts", type=int, default=8, help="so many of them, evenly spread (default: 8)")
    add("--new-tokens", type=int, default=128, help="exactly so many for each prompt (default: 128)")
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
    return made


def task_from_arguments(arguments: argparse.Namespace) -> Task:
    """Everything the user gave, checked."""
    for checkpoint in (arguments.checkpoint, arguments.draft):
        _check_checkpoint(checkpoint)
    config, draft = (json.loads((c / "config.json").read_text("utf-8")) for c in (arguments.checkpoint, arguments.draft))
    if config["vocab_size"] != draft["vocab_size"]:
        raise InputError(f"{arguments.draft} has {draft['vocab_size']} tokens, the checkpoint {config['vocab_size']}")
    if arguments.new_tokens < 2 or arguments.rounds < 1 or arguments.threads < 1:
        raise InputError("--new-tokens must be at least 2, --rounds and --threads at least 1")
    prompts = _prompts(arguments.data, arguments.prompts, arguments.checkpoint)
    longest = max(len(prompt.token_ids) for prompt in prompts) + arguments.new_tokens
    if longest > config["max_position_embeddings"]:
        raise InputError(f"prompt and new tokens are up to {longest}, the model takes {config['max_position_embeddings']}")
    if arguments.json and not arguments.json.parent.is_dir():
        raise InputError(f"{arguments.json.parent} is no folder to write a report to")
    _check_patterns([*arguments.only, *arguments.skip])
    return Task(
        checkpoint=arguments.checkpoint,
        draft=arguments.draft,
        bundles=_bundles(arguments.headstart, arguments.headstart_draft, arguments.checkpoint),
        prompts=prompts,
        new_tokens=arguments.new_tokens,
        threads=arguments.threads,
        only=arguments.only,
        skip=arguments.skip,
    )


def _check_checkpoint(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}: give a Hugging Face checkpoint with its weights in one file")
    family = json.loads((folder / "config.json").read_text("utf-8")).get("architectures")
    if family != ["LlamaForCausalLM"]:
        raise InputError(f"{folder} is {family}: this comparison is for LlamaForCausalLM")


def _prompts(file: Path, count: int, checkpoint: Path) -> list[Prompt]:
    """So many prompts, evenly spread over the file."""
    from tokenizers import Tokenizer

    if not file.is_file():
        raise InputError(f"{file} is not there")
    try:
        texts = [json.loads(line)["prompt"] for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{file} is not JSON lines with a field "prompt" ({error!r})') from error
    if not 1 <= count <= len(texts):
        raise InputError(f"--prompts must be from 1 to {len(texts)}, the number in {file}")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    chosen = [texts[i * len(texts) // count] for i in range(count)]
    return [Prompt(text, tokenizer.encode(text).ids) for text in chosen]


def _bundles(given: list[str], draft: Path | None, checkpoint: Path) -> dict[str, tuple[Path, Path | None]]:
    bundles: dict[str, tuple[Path, Path | None]] = {}
    for label, path in map(pair, given):
        if label in bundles:
            raise InputError(f"--headstart {label} is given twice")
        source = _source(Path(path))
        if draft:
            _source(draft)
        with (checkpoint / WEIGHTS).open("rb") as file:
            if source not in (None, hashlib.file_digest(file, "sha256").hexdigest()):
                raise InputError(f"{path} was exported from other weights than {checkpoint / WEIGHTS}")
        bundles[label] = (Path(path), draft)
    return bundles


def _source(bundle: Path) -> str | None:
    """The hash of the weights a bundle was exported from, None where it does not say."""
    manifest = bundle / "manifest.json"
    if not manifest.is_file():
        raise InputError(f"{bundle} is no bundle: it has no manifest.json")
    source = json.loads(manifest.read_text("utf-8")).get("provenance", {}).get("source_sha256", {})
    return source.get(WEIGHTS)


def pythons_from(given: list[str]) -> dict[str, Path]:
    """Interpreters that stand in for environments of our own."""
    pythons = {name: Path(path) for name, path in map(pair, given)}
    for name, path in pythons.items():
        if name not in RIVALS or not path.is_file():
            raise InputError(f"--python {name}={path}: no such rival or no such interpreter. Rivals: {', '.join(RIVALS)}")
    return pythons


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise InputError(f"{text!r} is not NAME=VALUE")
    return name, value


def _check_patterns(patterns: list[str]) -> None:
    for pattern in patterns:
        rival = pattern.split("/")[0]
        if not any(fnmatch(name, rival) for name in RIVALS):
            raise InputError(f"{pattern!r} names no rival. Choose from: {', '.join(RIVALS)}")


def _matches(name: str, pattern: str) -> bool:
    """Whether a name agrees with a pattern as far as both go: "a/int8" with "a", and with "a/int8/plain"."""
    return all(fnmatch(part, wanted) for part, wanted in zip(name.split("/"), pattern.split("/"), strict=False))

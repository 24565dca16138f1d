"""Text to tokens and back, and back piece by piece.

A thin layer over the `tokenizers` library, and `TextStream`, which never shows half a character and never shows the
beginning of a stop string. Chat templates are rendered as by transformers' `apply_chat_template`.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from .errors import BundleError, OptionError, PromptError

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no character (yet)
MAX_HELD = 8  # tokens: a UTF-8 character has at most 4 bytes, so longer runs of REPLACEMENT are real
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ChatText(str):
    """A conversation rendered by a chat template, which writes the special tokens itself: encoding adds none."""

    __slots__ = ()

    def __str__(self) -> "ChatText":
        return self


def check_tokens(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises PromptError for a token that the model has no embedding for, at its first position."""
    for position, token in enumerate(token_ids):
        if not 0 <= token < vocab_size:
            raise PromptError(
                f"Token {token} (number {position + 1} of {len(token_ids)}) is not in the model's vocabulary: ids go from 0 "
                f"to {vocab_size - 1}. Fix: leave the text of that token out, or export a checkpoint whose embedding has it."
            )


class Tokenizer:
    """tokenizer.json, and the chat template when the model has one."""

    def __init__(self, fast: FastTokenizer, settings: dict[str, Any], chat_template: str | None) -> None:
        self._fast = fast
        self._settings = settings
        self._chat_template = chat_template

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Raises BundleError when tokenizer.json is missing or cannot be read."""
        file = folder / "tokenizer.json"
        try:
            fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(
                f"{file} cannot be read as a tokenizer ({error}). Fix: export or copy the bundle again."
            ) from error
        fast.no_truncation()
        fast.no_padding()
        config = folder / "tokenizer_config.json"
        settings = json.loads(config.read_text("utf-8")) if config.is_file() else {}
        template = folder / "chat_template.jinja"
        chat = template.read_text("utf-8") if template.is_file() else _default_template(settings.get("chat_template"))
        return cls(fast, settings, chat)

    @property
    def vocab_size(self) -> int:
        return int(self._fast.get_vocab_size())

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that `decode` leaves out."""
        return frozenset(token for token, added in self._fast.get_added_tokens_decoder().items() if added.special)

    @cached_property
    def opening_ids(self) -> list[int]:
        """The special tokens that the model expects before a text, most often one (BOS) or none."""
        encoded = self._fast.encode("a")
        own = encoded.special_tokens_mask.index(0)
        return list(encoded.ids[:own])

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids, with the special tokens the model expects around a text if `special`; a chat template's text has its own.

        A text that begins with the first of these tokens does not get it twice. Raises PromptError for a lone surrogate.
        """
        check_text(text)
        special = special and not isinstance(text, ChatText)
        ids = list(self._fast.encode(text, add_special_tokens=special).ids)
        bos = _content(self._settings.get("bos_token"))
        doubled = bool(special and bos and text.startswith(bos) and len(ids) > 1 and ids[0] == ids[1])
        return ids[1:] if doubled and ids[0] == self._fast.token_to_id(bos) else ids

    def id_of(self, token: str) -> int | None:
        """Of a token as the vocabulary writes it; None where it has none."""
        found: int | None = self._fast.token_to_id(token)
        return found

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self._fast.decode(list(token_ids), skip_special_tokens=True))

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> ChatText:
        """The prompt for a conversation ({"role", "content"} each) that the assistant is to continue.

        Raises OptionError when the model has no chat template, PromptError when the template refuses the messages.
        """
        if self._chat_template is None:
            raise OptionError("This model has no chat template: it completes text. Fix: omit --chat.")
        special = {name: _content(self._settings.get(name)) for name in SPECIAL_TOKENS if self._settings.get(name)}
        # transformers passes these two as None, and templates tell None from undefined.
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **special}
        try:
            return ChatText(_environment().from_string(self._chat_template).render(**given))
        except Exception as error:  # a template is a program: it can fail in any way
            raise PromptError(f"The model's chat template refuses these messages: {error}.") from error


def check_text(text: str) -> None:
    """Raises PromptError for a string that is no Unicode text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"The text is not valid Unicode: character {error.start + 1} is the lone surrogate U+{ord(text[error.start]):04X}. "
            "Fix: text in UTF-8."
        ) from error


def _environment() -> Any:
    """Jinja as transformers sets it up."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the assistant's text for training; it is rendered like any other."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    extensions: list[Any] = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _default_template(setting: Any) -> str | None:
    """tokenizer_config.json has one template, or a list of {"name", "template"}."""
    if isinstance(setting, list):
        return {entry["name"]: entry["template"] for entry in setting}.get("default")
    return setting if isinstance(setting, str) else None


def _content(token: Any) -> str:
    """A special token as tokenizer_config.json writes it: a string, or an object with its text."""
    if isinstance(token, dict):
        return str(token.get("content", ""))
    return token or ""


class TextStream:
    """Decodes tokens as they come.

    A token's text may depend on the token before it (prefix spaces) and its bytes may be part of a character, so a
    window is decoded: from `_anchor`, whose text was shown, to the end. The window moves on with every shown piece, and
    begins in the prompt, so that the prompt's text and this one together are the whole text.

    A stop string that contains special tokens is compared token by token, since the text does not show them.

    Args:
        stop: texts that end the stream.
        prompt_ids: the tokens before the first one that is pushed; only the last few matter.

    Attributes:
        stopped: a stop string occurred; the text shown ends before it.
        token_count: tokens up to and with the one that completed the stop string; all tokens while not stopped.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        encoded = {text: tuple(tokenizer.encode(text, special=False)) for text in stop if text}
        self._stop = [text for text, ids in encoded.items() if tokenizer.special_ids.isdisjoint(ids)]
        self._stop_tokens = [ids for ids in encoded.values() if not tokenizer.special_ids.isdisjoint(ids)]
        self._longest_stop = max(map(len, self._stop_tokens), default=0)
        self._tokens = _context(tokenizer, prompt_ids)
        self._start = len(self._tokens)  # first token that was pushed
        self._anchor = 0  # first token of the window
        self._shown = len(self._tokens)  # tokens whose text was shown
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False
        self.token_count = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became final with these tokens."""
        pieces = []
        for token in token_ids:
            if not self.stopped:
                self._tokens.append(token)
                self.token_count += 1
                pieces.append(self._read())
        return "".join(pieces)

    def _read(self) -> str:
        """The text that became final with the last token."""
        last = self._tokens[max(self._start, len(self._tokens) - self._longest_stop) :]
        matched = max((_overlap(last, ids, len(ids)) for ids in self._stop_tokens), default=0)
        end = len(self._tokens) - matched  # the tokens from there on may be the beginning of a stop
        if any(matched == len(ids) and tuple(last[-matched:]) == ids for ids in self._stop_tokens):
            text = self._before_stop(self._held + self._next_text(end, final=True))
            self._held, self.stopped = "", True
            return text
        return self._release(self._next_text(end)) if end > self._shown else ""

    def finish(self) -> str:
        """What was held back, when no more tokens come. An incomplete character comes as the decoder shows it."""
        if self.stopped:
            return ""
        rest = self._held + self._next_text(len(self._tokens), final=True)
        self._held = ""
        return self._before_stop(rest)

    def _next_text(self, end: int, final: bool = False) -> str:
        """The text of the tokens from `_shown` to `end`; "" while it may end in half a character, unless `final`."""
        before = self._tokenizer.decode(self._tokens[self._anchor : self._shown])
        whole = self._tokenizer.decode(self._tokens[self._anchor : end])
        if not final and whole.endswith(REPLACEMENT) and end - self._shown < MAX_HELD:
            return ""
        self._anchor, self._shown = self._shown, end
        return whole[len(before) :]

    def _release(self, text: str) -> str:
        """All of the text but an ending that could begin a stop string."""
        text = self._before_stop(self._held + text)
        self._held = ""
        if self.stopped or not self._stop:
            return text
        longest = max(_overlap(text, stop, len(stop) - 1) for stop in self._stop)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]

    def _before_stop(self, text: str) -> str:
        starts = [index for index in (text.find(stop) for stop in self._stop) if index >= 0]
        if not starts:
            return text
        self.stopped = True
        return text[: min(starts)]


def _overlap(sequence: Sequence[Any], stop: Sequence[Any], longest: int) -> int:
    """Length of the longest ending of `sequence` that begins `stop`, at most `longest`."""
    for size in range(min(len(sequence), longest), 0, -1):
        if list(sequence[len(sequence) - size :]) == list(stop[:size]):
            return size
    return 0


def _context(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> list[int]:
    """The fewest last tokens of the prompt that are text and do not begin within a character; [] where there are none."""
    for size in range(1, min(len(prompt_ids), MAX_HELD) + 1):
        last = list(prompt_ids[-size:])
        text = tokenizer.decode(last)
        if text and not text.startswith(REPLACEMENT):
            return last
    return []

"""Text to tokens and back, and back piece by piece.

A thin face of the `tokenizers` library. `TextStream` is what is ours: it never shows half a character and never shows
the beginning of a stop string.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from .errors import BundleError, OptionError, PromptError

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no character (yet)
MAX_HELD = 8  # tokens: a UTF-8 character has at most 4 bytes, so longer runs of REPLACEMENT are real


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
        chat = template.read_text("utf-8") if template.is_file() else settings.get("chat_template")
        return cls(fast, settings, chat if isinstance(chat, str) else None)

    @property
    def vocab_size(self) -> int:
        return int(self._fast.get_vocab_size())

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids, with the special tokens the model expects around a text unless not `special`."""
        return list(self._fast.encode(text, add_special_tokens=special).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text, special tokens left out."""
        return str(self._fast.decode(list(token_ids), skip_special_tokens=True))

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt for a conversation ({"role", "content"} each) that the assistant is to continue.

        Raises OptionError when the model has no chat template, PromptError when the template refuses the messages.
        """
        if self._chat_template is None:
            raise OptionError("This model has no chat template: it completes text. Fix: leave --chat away.")
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
        special = {name: _content(self._settings.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        try:
            return environment.from_string(self._chat_template).render(messages=messages, add_generation_prompt=True, **special)
        except jinja2.TemplateError as error:
            raise PromptError(f"The model's chat template refuses these messages: {error}.") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _content(token: Any) -> str:
    """A special token as tokenizer_config.json writes it: a string, or an object with its text."""
    if isinstance(token, dict):
        return str(token.get("content", ""))
    return token or ""


class TextStream:
    """Decodes tokens as they come.

    A token's text may depend on the token before it (prefix spaces) and its bytes may be part of a character, so a
    window is decoded: from `_anchor`, whose text was shown, to the end. The window moves on with every shown piece.

    Attributes:
        stopped: a stop string was found; the text shown ends before it.
        token_count: tokens up to and with the one that completed the stop string; all tokens while not stopped.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._tokens: list[int] = []
        self._anchor = 0  # first token of the window
        self._shown = 0  # tokens of the window whose text went out
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
                pieces.append(self._release(self._next_text()))
        return "".join(pieces)

    def finish(self) -> str:
        """What was held back, when no more tokens come. An incomplete character comes as the decoder shows it."""
        if self.stopped:
            return ""
        rest = self._held + self._release_all()
        self._held = ""
        return self._before_stop(rest)

    def _next_text(self, final: bool = False) -> str:
        before = self._tokenizer.decode(self._tokens[self._anchor : self._shown])
        whole = self._tokenizer.decode(self._tokens[self._anchor :])
        waiting = len(self._tokens) - self._shown
        if not final and whole.endswith(REPLACEMENT) and waiting < MAX_HELD:
            return ""
        self._anchor, self._shown = self._shown, len(self._tokens)
        return whole[len(before) :]

    def _release_all(self) -> str:
        return self._next_text(final=True)

    def _release(self, text: str) -> str:
        """Pass text on, but for an ending that could begin a stop string."""
        text = self._before_stop(self._held + text)
        self._held = ""
        if self.stopped or not self._stop:
            return text
        longest = max(len(_overlap(text, stop)) for stop in self._stop)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]

    def _before_stop(self, text: str) -> str:
        found = [index for index in (text.find(stop) for stop in self._stop) if index >= 0]
        if not found:
            return text
        self.stopped = True
        return text[: min(found)]


def _overlap(text: str, stop: str) -> str:
    """The longest ending of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return stop[:size]
    return ""

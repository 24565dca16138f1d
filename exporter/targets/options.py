"""A device's options from those the user gave by name, as the command line collects them for all devices together."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from headstart.runtime.errors import OptionError

from .table import target_for


def options_for(device: str, given: Mapping[str, object]) -> Any:
    """The device's options, its defaults for those that are not given. Parts of options (`builder`) are given by their fields.

    Args:
        device: as the user writes it.
        given: field name -> value; None and False are not given.

    Raises OptionError for an unknown device, or for an option that belongs to other devices, by its name.
    """
    kind = target_for(device).options_type
    chosen = {name: value for name, value in given.items() if value is not None and value is not False}
    known = _names(kind)
    for name in chosen:
        if name not in known:
            takes = ", ".join(map(_flag, known)) or "no options"
            raise OptionError(f"{_flag(name)} does not go with --device {device}, which takes {takes}. Fix: leave it out.")
    return _filled(kind, chosen)


def _names(kind: type[Any]) -> list[str]:
    """Fields of an options class, and of the classes it holds."""
    parts = _parts(kind)
    return [
        name
        for field in dataclasses.fields(kind)
        for name in (_names(parts[field.name]) if field.name in parts else [field.name])
    ]


def _parts(kind: type[Any]) -> dict[str, type[Any]]:
    """Fields that are options classes themselves."""
    hints = typing.get_type_hints(kind).items()
    return {name: hint for name, hint in hints if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


def _filled(kind: type[Any], chosen: Mapping[str, object]) -> Any:
    parts = {name: _filled(part, chosen) for name, part in _parts(kind).items()}
    own = {field.name: chosen[field.name] for field in dataclasses.fields(kind) if field.name in chosen}
    return kind(**parts | own)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

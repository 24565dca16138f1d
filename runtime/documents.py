"""JSON documents: frozen dataclasses to JSON text and back. Unknown and missing keys are errors."""

import dataclasses
import json
import types
import typing
from typing import Any, TypeVar

from .errors import BundleError

T = TypeVar("T")


def to_json(value: Any) -> str:
    return json.dumps(dataclasses.asdict(value), indent=2) + "\n"


def from_json(kind: type[T], text: str) -> T:
    """The inverse of `to_json`. Raises BundleError on missing or unknown keys."""
    return from_document(kind, json.loads(text), kind.__name__)


def from_document(kind: type[T], document: Any, where: str) -> T:
    """As `from_json`, of parsed JSON; `where` names the document in errors."""
    return typing.cast(T, _decode(kind, document, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Rebuild dataclasses, tuples, dicts and unions of scalars from plain JSON."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        optional = {
            n for n, f in fields.items() if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        }
        wrong = (set(value) - set(fields)) | (set(fields) - optional - set(value))
        if wrong:
            raise BundleError(f"{where}: unknown or missing keys {sorted(wrong)}. Fix: export again with this version.")
        return kind(**{key: _decode(hints[key], item, f"{where}.{key}") for key, item in value.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(_decode(args[0], item, where) for item in value)
    if origin is dict:
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, dict) and args:
        return _decode(args[0], value, where)  # an optional dataclass
    scalars = args if origin in (typing.Union, types.UnionType) else (kind,)
    if not isinstance(value, scalars):
        raise BundleError(f"{where}: expected {kind}, found {value!r}. Fix: export or copy the bundle again.")
    return value

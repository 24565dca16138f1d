"""JSON documents: frozen dataclasses to JSON text and back, by cattrs.

Nothing is converted on the way: an unknown or missing key, and a value of another type, are errors that name the field.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_origin

import cattrs
from cattrs.cols import list_structure_factory
from cattrs.strategies import configure_union_passthrough

from .errors import BundleError

T = TypeVar("T")
NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def to_json(value: Any) -> str:
    return json.dumps(dataclasses.asdict(value), indent=2) + "\n"


def from_json(kind: type[T], text: str, where: str = "") -> T:
    """The inverse of `to_json`. Raises BundleError for a text that is no JSON, or not that of a `kind`."""
    where = where or kind.__name__
    return from_document(kind, parse_json(text, where), where)


def parse_json(text: str, where: str) -> Any:
    """Raises BundleError, which begins with `where`, for a text that is no JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise BundleError(f"{where} is not JSON ({error}). Fix: export or copy the bundle again.") from error


def from_document(kind: type[T], document: Any, where: str) -> T:
    """As `from_json`, of parsed JSON; `where` names the document in errors."""
    try:
        return _CONVERTER.structure(document, kind)
    except (cattrs.BaseValidationError, TypeError) as error:
        faults = cattrs.transform_error(error, path=where, format_exception=_described)
        raise BundleError(f"{'; '.join(faults[:3])}. Fix: export or copy the bundle again, with this version.") from error


def _described(error: BaseException, kind: type | None) -> str:
    if isinstance(error, KeyError):
        return f"missing keys: {error}"
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        return f"unknown keys: {', '.join(map(repr, sorted(error.extra_fields)))}"
    return str(error)


def _exactly(kind: type, *accepted: type) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if type(value) not in (kind, *accepted):
            raise TypeError(f"expected {NAMES[kind]}, found {value!r}")
        return kind(value)

    return structure


def _is_tuple(kind: Any) -> bool:
    origin: Any = get_origin(kind)
    return origin is tuple


def _tuple_hook(kind: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """cattrs takes any iterable, so a string for a tuple of strings."""
    of_list: Any = list[get_args(kind)[0]]  # type: ignore[misc]
    structure = list_structure_factory(of_list, converter)

    def of_tuple(value: Any, _: Any) -> Any:
        if not isinstance(value, list):
            raise TypeError(f"expected a list, found {value!r}")
        return tuple(structure(value, of_list))

    return of_tuple


def _dataclass_hook(kind: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    structure = cattrs.gen.make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True)

    def of_object(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise TypeError(f"expected an object, found {value!r}")
        return structure(value, kind)

    return of_object


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind, accepted in ((int, ()), (float, (int,)), (str, ()), (bool, ())):
        converter.register_structure_hook(kind, _exactly(kind, *accepted))
    configure_union_passthrough(int | float | str | bool | None, converter)
    converter.register_structure_hook_factory(_is_tuple, _tuple_hook)
    converter.register_structure_hook_factory(dataclasses.is_dataclass, _dataclass_hook)
    return converter


_CONVERTER = _converter()

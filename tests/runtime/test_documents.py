"""Dataclasses to JSON and back: every document that differs from its schema is an error that names the field."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from headstart.runtime.documents import from_document, from_json, to_json
from headstart.runtime.errors import BundleError


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int | str, ...]
    ratio: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    count: int
    inner: dict[str, Inner]
    early: bool | str = False
    limit: int | None = None
    one: Inner | None = None
    names: tuple[str, ...] = ()
    pairs: tuple[tuple[int, ...], ...] = ()
    flags: dict[str, tuple[str, ...]] = field(default_factory=dict)


WHOLE = Outer("a", 3, {"x": Inner((1, "batch"), 0.5)}, "never", 7, Inner(()), ("n",), ((1, 2), ()), {"f": ("g",)})


def test_round_trip() -> None:
    assert from_json(Outer, to_json(WHOLE)) == WHOLE
    assert from_json(Outer, '{"name": "a", "count": 3, "inner": {}}') == Outer("a", 3, {})
    assert from_json(Inner, '{"sizes": [], "ratio": 1}') == Inner((), 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": "3"}, "expected an integer, found '3' @ bundle/file.json.count"),
        ({"count": 3.0}, "expected an integer, found 3.0 @ bundle/file.json.count"),
        ({"count": True}, "expected an integer, found True @ bundle/file.json.count"),
        ({"name": None}, "expected a string, found None @ bundle/file.json.name"),
        ({"names": "abc"}, "expected a list, found 'abc' @ bundle/file.json.names"),
        ({"names": ["a", 1]}, "expected a string, found 1 @ bundle/file.json.names[1]"),
        ({"pairs": [[1], [2, None]]}, "found None @ bundle/file.json.pairs[1][1]"),
        ({"inner": {"x": {"sizes": [], "ratio": "1"}}}, "expected a number, found '1' @ bundle/file.json.inner['x'].ratio"),
        ({"inner": {"x": 5}}, "expected an object, found 5 @ bundle/file.json.inner['x']"),
        ({"inner": {"x": {}}}, "missing keys: 'sizes' @ bundle/file.json.inner['x']"),
        ({"one": {"sizes": [], "old": 1}}, "unknown keys: 'old' @ bundle/file.json.one"),
        ({"extra": 1, "another": 2}, "unknown keys: 'another', 'extra' @ bundle/file.json"),
    ],
)
def test_faults_name_the_field_and_the_file(change: dict[str, Any], message: str) -> None:
    document = json.loads(to_json(WHOLE)) | change
    with pytest.raises(BundleError, match=re.escape(message)):
        from_document(Outer, document, "bundle/file.json")


@pytest.mark.parametrize("text", ["[]", "5", "null", '"text"'])
def test_other_documents(text: str) -> None:
    with pytest.raises(BundleError, match="expected an object"):
        from_json(Outer, text)
    with pytest.raises(BundleError, match="file is not JSON"):
        from_json(Outer, text[:-1] + "{", "file")


@pytest.mark.parametrize("change", [{"early": 1.5}, {"early": None}, {"limit": "7"}, {"inner": {"x": {"sizes": [1.5]}}}])
def test_unions_take_their_own_types_only(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=f"file.{next(iter(change))}"):
        from_document(Outer, json.loads(to_json(WHOLE)) | change, "file")

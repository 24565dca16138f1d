"""The three top-level folders are the headstart package, nothing is left out of the wheel, and imports only point down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PARTS = ("exporter", "runtime", "calibration")
FLOORS = {"runtime": 1, "exporter": 2, "calibration": 3, "headstart": 4}


@pytest.mark.parametrize("part", PARTS)
def test_link_points_at_top_level_folder(part: str) -> None:
    assert (ROOT / "headstart" / part).resolve() == ROOT / part


def test_every_package_is_shipped() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    inits = [init for part in PARTS for init in (ROOT / part).rglob("__init__.py")]
    found = {".".join(("headstart", *init.parent.relative_to(ROOT).parts)) for init in inits}
    assert found | {"headstart"} == set(pyproject["tool"]["setuptools"]["packages"])


def source_files() -> list[Path]:
    return [
        file
        for part in FLOORS
        for file in sorted((ROOT / part).rglob("*.py"))
        if "headstart" not in file.parts[len(ROOT.parts) + 1 :]
    ]


def imported_names(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


def test_imports_only_point_down() -> None:
    for file in source_files():
        part = file.relative_to(ROOT).parts[0]
        for name in imported_names(file):
            assert name.split(".")[0] not in PARTS, f"{file} imports {name}: write headstart.{name}"
            other = name.split(".")[1] if name.startswith("headstart.") else ""
            assert FLOORS.get(other, 0) <= FLOORS[part], f"{file} ({part}) imports {name}, which stands above it"


def test_runtime_never_names_the_heavy_packages() -> None:
    heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum"}
    for file in (ROOT / "runtime").rglob("*.py"):
        found = {name.split(".")[0] for name in imported_names(file)} & heavy
        assert not found, f"{file} imports {found}"


def test_importing_headstart_loads_nothing_heavy() -> None:
    code = "import sys, headstart, headstart.cli, headstart.runtime.model; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "onnx", "onnxruntime", "optimum"} & set(loaded)


def test_help_needs_no_heavy_module() -> None:
    code = "import sys, headstart.cli\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "tokenizers", "torch", "jinja2"} & set(loaded)


def test_public_names_resolve() -> None:
    import headstart

    for name in headstart.__all__:
        assert getattr(headstart, name) is not None
    assert set(headstart._HOMES) == set(headstart.__all__)

"""The house: packages and their floors, no circles among imports, short functions, and the tables where a newcomer begins."""

import ast
import importlib
import statistics
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PARTS = ("exporter", "runtime", "calibration")
FLOORS = {"runtime": 1, "exporter": 2, "calibration": 3, "headstart": 4}
LONGEST, MEDIAN = 59, 10  # lines of a function, its signature included
TABLES = {
    "FAMILIES": "headstart.exporter.heads.families",
    "DRAFTERS": "headstart.runtime.drafters.families",
    "RULES": "headstart.runtime.acceptance",
    "TARGETS": "headstart.exporter.targets.table",
    "ENGINES": "headstart.runtime.engines.registry",
}


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


def module_name(file: Path) -> str:
    """exporter/graph.py is headstart.exporter.graph; a package's __init__.py is the package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in (*(() if parts[0] == "headstart" else ("headstart",)), *parts) if part != "__init__")


def imported_modules(name: str, is_package: bool, source: str, known: set[str]) -> set[str]:
    """The modules among `known` that `source` imports anywhere: at the top, in functions, or under TYPE_CHECKING."""
    package = name if is_package else name.rpartition(".")[0]
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            members = {f"{base}.{alias.name}" for alias in node.names}
            imported |= members & known or {base}  # `from package import module` imports the module
    return (imported & known) - {name}


def circle_of(imports: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, the first named twice; [] when there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_form_no_circle() -> None:
    files = {module_name(file): file for file in source_files()}
    packages = {name for name, file in files.items() if file.name == "__init__.py"}
    known = set(files) - packages  # an __init__ only names what its package offers
    assert len(known) > 100
    imports = {name: imported_modules(name, name in packages, files[name].read_text("utf-8"), known) for name in sorted(known)}
    circle = circle_of(imports)
    assert not circle, f"modules that import one another: {' <- '.join(circle)}"


@pytest.mark.parametrize(
    "source",
    [
        "from .b import x",
        "from . import b",
        "import headstart.runtime.b",
        "from headstart.runtime.b import x",
        "from headstart.runtime import b",
        "def f():\n    from .b import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import x",
        "from .deeper.c import x",
        "def f():\n    from .deeper import c",
    ],
)
def test_every_form_of_a_circle_is_seen(source: str) -> None:
    known = {"headstart.runtime.a", "headstart.runtime.b", "headstart.runtime.deeper.c"}
    sources = {
        "headstart.runtime.a": source,
        "headstart.runtime.b": "from .a import y",
        "headstart.runtime.deeper.c": "from ..b import y",
    }
    imports = {name: imported_modules(name, False, text, known) for name, text in sources.items()}
    assert circle_of(imports)
    assert not circle_of(imports | {"headstart.runtime.b": set()})


def function_lengths() -> list[tuple[int, str]]:
    """(lines from `def` to the end, where) of every function and method."""
    return [
        (node.end_lineno - node.lineno + 1, f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
        for file in source_files()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None
    ]


def test_functions_are_short() -> None:
    lengths = function_lengths()
    assert len(lengths) > 1000
    assert statistics.median(lines for lines, _ in lengths) <= MEDIAN
    longest, where = max(lengths)
    assert longest <= LONGEST, f"{where} has {longest} lines"


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_rows_by_name(name: str) -> None:
    table = getattr(importlib.import_module(TABLES[name]), name)
    assert table and all(isinstance(key, str) for key in table)


def test_contributing_names_the_tables() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for name, module in TABLES.items():
        file = module.removeprefix("headstart.").replace(".", "/") + ".py"
        assert f"`{name}`" in text and f"`{file}`" in text and (ROOT / file).is_file()


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

"""The sample's text: the source of Python's standard library, split into train and held-out files.

The split hashes each file's path, so it is the same on every machine and does not move when files are added.
"""

import ast
import hashlib
import sysconfig
from pathlib import Path

# Tables and generated data rather than code: nothing to learn from them.
NOT_CODE = (
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "lib2to3/tests/data",
    "test/cjkencodings",
    "__pycache__",
)
HELD_OUT_PERCENT = 5


def stdlib_files() -> list[Path]:
    """Every parsable module of the running interpreter's standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not any(part in path.as_posix() for part in NOT_CODE))
    return [path for path in files if _is_code(path)]


def _is_code(path: Path) -> bool:
    try:
        source = path.read_text("utf-8")
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return 200 < len(source) < 400_000


def is_held_out(path: Path) -> bool:
    """True for about one file in twenty, chosen by the hash of its path below the library's root."""
    name = path.relative_to(sysconfig.get_path("stdlib")).as_posix()
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def split() -> tuple[list[Path], list[Path]]:
    """(training files, held-out files)."""
    files = stdlib_files()
    return [f for f in files if not is_held_out(f)], [f for f in files if is_held_out(f)]

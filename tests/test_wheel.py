"""The wheel with its cpu extra, in an empty environment, decodes a copied bundle; nothing heavy is there."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headstart.runtime.bundle import Bundle

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "onnx", "optimum")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel alone: no extra, so no engine either."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(
        ROOT,
        folder / "source",
        symlinks=True,
        ignore=shutil.ignore_patterns(".venv", ".git", ".demo", "build", "*.egg-info", ".work"),
    )
    built = run(sys.executable, "-m", "build", "--outdir", folder / "dist", source)
    assert built.returncode == 0, built.stderr
    assert run(sys.executable, "-m", "venv", folder / "env").returncode == 0
    wheel = next((folder / "dist").glob("*.whl"))
    installed = run(folder / "env/bin/pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel)
    assert installed.returncode == 0, installed.stderr
    return folder


@pytest.mark.slow
def test_wheel_decodes_without_torch(empty_environment: Path, bundle_of: Callable[[str], Bundle], tmp_path: Path) -> None:
    copy = shutil.copytree(bundle_of("llama").path, tmp_path / "copied")
    command = (empty_environment / "env/bin/headstart", "generate", copy, "abc", "-n", "16", "--stats")
    bare = run(*command)
    assert bare.returncode == 2 and "pip install 'headstart[cpu]'" in bare.stderr, bare.stderr
    wheel = next((empty_environment / "dist").glob("*.whl"))
    pip = empty_environment / "env/bin/pip"
    assert run(pip, "install", "-q", "-c", ROOT / "constraints.txt", f"{wheel}[cpu]").returncode == 0
    done = run(*command)
    assert done.returncode == 0 and "acceptance length" in done.stderr, done.stderr
    here = run(sys.executable, "-m", "headstart", "generate", copy, "abc", "-n", "16")
    assert done.stdout == here.stdout
    listed = run(pip, "list", "--format=freeze").stdout.lower()
    assert not [name for name in HEAVY if f"\n{name}==" in f"\n{listed}"], listed
    for command in (("export", "x", "-o", tmp_path / "out"), ("heads", "train", "x", "--data", copy, "-o", tmp_path / "out")):
        refused = run(empty_environment / "env/bin/headstart", *command)
        assert refused.returncode == 2 and "headstart[export]" in refused.stderr

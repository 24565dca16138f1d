"""The commands and the Python of README and docs are run as they stand, links lead somewhere, and the samples run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from headstart.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = (ROOT / "docs/commands.md").read_text("utf-8")  # continues the README's quickstart
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it: in the clone's root, but with nothing built yet."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "samples").symlink_to(ROOT / "samples")
    return folder


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_commands_run_as_written(workplace: Path) -> None:
    lines = "".join(blocks("bash", README) + blocks("bash", COMMANDS)).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if line.startswith("headstart ")]
    assert len(commands) >= 24
    for command in commands:
        run([sys.executable, "-m", *shlex.split(command, comments=True)], workplace)


def test_python_runs_as_written(workplace: Path) -> None:
    code = blocks("python", README), blocks("python", COMMANDS)
    assert all(code)
    for block in [*code[0], *code[1]]:
        run([sys.executable, "-c", block], workplace)


def test_sample_runs(workplace: Path) -> None:
    out = run([sys.executable, "samples/01_complete_python/run.py", str(workplace / "bundle")], workplace)
    assert "load_settings" in out and "medusa" in out


def test_first_code_block_and_the_two_commands() -> None:
    first = README.splitlines().index(next(line for line in README.splitlines() if line.startswith("```"))) + 1
    assert first < 25
    assert "make demo" in README and "make test" in README
    assert len(README.splitlines()) < 150


def test_every_command_is_documented() -> None:
    """By its row in the table, and by a line that is run, unless it stands for something else that is."""
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    rows = set(re.findall(r"`([a-z]+)`", "".join(line for line in COMMANDS.splitlines() if line.startswith("| `"))))
    assert names <= rows
    lines = "".join(blocks("bash", README) + blocks("bash", COMMANDS))
    assert names - set(re.findall(r"^headstart ([a-z]+)", lines, re.MULTILINE)) <= {"demo", "upgrade"}


@pytest.mark.parametrize("page", [*PAGES, "samples/checkpoints/pycode/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"

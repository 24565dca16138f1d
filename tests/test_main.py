"""The program's habits: version, standard input, and signals."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import headstart


def run(*arguments: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "headstart", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, check=False)


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout.decode()) == (0, f"headstart {headstart.__version__}\n")


def test_a_prompt_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as `generate` does with standard input before it opens a bundle, and after."""
    code = "from headstart import cli; cli.app = lambda: cli._prompt(None); cli.main()"
    done = subprocess.run([sys.executable, "-c", code], input=b"\x89PNG\xff", capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("headstart: Standard input is not UTF-8 text (")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_cleans_up(tmp_path: Path, number: signal.Signals) -> None:
    """The command line's own handler, and a command that has begun to write."""
    code = (
        "import pathlib, sys, time\n"
        "from headstart import cli\n"
        "from headstart.runtime.output import new_folder\n"
        "def work():\n"
        "    with new_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "        print(folder, flush=True)\n"
        "        time.sleep(60)\n"
        "cli.app = work\n"
        "cli.main()\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "out")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A parent that runs in the background ignores SIGINT, and children inherit that: the user's terminal does not.
    with subprocess.Popen(arguments, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL), **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        assert Path(process.stdout.readline().strip()).is_dir()
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        assert process.stderr.read() == "headstart: interrupted; nothing half-written was left.\n"
    assert list(tmp_path.iterdir()) == []

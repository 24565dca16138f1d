"""Stand-ins for the CUDA libraries that compute nothing, so that onnxruntime-gpu's own provider runs on any Linux machine.

The provider then places real nodes, prepacks weights, binds, captures and replays; memory is the host's, copies are made, and
kernels leave their outputs as they were. Numbers mean nothing; what is refused, a GPU would refuse.

    python -m venv gpu && gpu/bin/pip install onnxruntime-gpu onnx onnx-ir onnxscript tokenizers typer rich jinja2
    pip install --target headers nvidia-cuda-runtime nvidia-cuda-crt
    python tests/gpu/stand_in/make.py gpu headers libraries
    LD_LIBRARY_PATH=libraries gpu/bin/python tests/gpu/stand_in/place.py BUNDLE
    LD_LIBRARY_PATH=libraries gpu/bin/python tests/gpu/kernels.py
"""

import re
import subprocess
import sys
from pathlib import Path

CREATED = "*handle = (void*)64;"  # any address will do: nobody looks behind it


def undefined(provider: Path) -> dict[str, list[str]]:
    """Library -> the symbols that the provider wants of it."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True).stdout
    wanted: dict[str, list[str]] = {}
    for symbol in (line.split()[-1] for line in listed.splitlines()):
        name, _, library = symbol.partition("@")
        wanted.setdefault(library, []).append(name)
    return wanted


def stub(symbols: list[str]) -> str:
    """C of functions that succeed; those that create something give back an address."""
    bodies = {name: CREATED if "Create" in name else "" for name in symbols}
    return "".join(f"int {name}(void** handle) {{ {body} return 0; }}\n" for name, body in bodies.items())


def compiled(folder: Path, library: str, made_up: str, *more: str | Path, versioned: bool = True) -> None:
    """A shared library of C that was made up, and of `more` arguments of the compiler."""
    source, script = folder / f"{library}.c", folder / f"{library}.map"
    source.write_text(made_up)
    script.write_text(f"{library} {{ global: *; }};\n")
    options = [f"-Wl,--version-script,{script}"] if versioned else []
    command = ["gcc", "-w", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library}", *options, source, *more]
    subprocess.run([*command, "-o", folder / library], check=True)


def main() -> None:
    venv, headers, folder = map(Path, sys.argv[1:4])
    folder.mkdir(exist_ok=True)
    capi = next(venv.glob("lib/python3*/site-packages/onnxruntime/capi"))
    include = next(headers.glob("nvidia/*/include/cuda_runtime_api.h")).parent
    cuda, tensorrt = (undefined(capi / f"libonnxruntime_providers_{name}.so") for name in ("cuda", "tensorrt"))
    answers = Path(__file__).with_name("cudart.c")
    answered = set(re.findall(r"(\w+)\(", answers.read_text()))
    for library, symbols in cuda.items():
        wanted = sorted({*symbols, *tensorrt.get(library, [])})
        if library.startswith("libcublas"):
            compiled(folder, library, stub(wanted))
        elif library.startswith("libcudart"):
            silent = [name for name in wanted if name not in answered]
            compiled(folder, library, stub(silent), answers, f"-I{include}")
    compiled(folder, "libcuda.so.1", stub(["cuTensorMapEncodeTiled"]), versioned=False)
    compiled(folder, "libcurand.so.10", "", versioned=False)
    compiled(folder, "libcudnn.so.9", stub(["cudnnCreate", "cudnnDestroy", "cudnnSetStream"]))
    # TensorRT's few symbols carry no version, and it is only asked whether it is there.
    absent = "".join(f"void* {name}(void) {{ return 0; }}\n" for name in tensorrt[""] if name.startswith(("create", "get")))
    for library in ("libnvinfer.so.10", "libnvonnxparser.so.10"):
        compiled(folder, library, absent, versioned=False)


if __name__ == "__main__":
    main()

"""Stand-ins for the CUDA libraries that compute nothing, so that onnxruntime-gpu's own provider runs on any Linux machine.

The provider then places real nodes, prepacks weights, binds, captures and replays; memory is the host's, copies are made, and
kernels leave their outputs as they were. Numbers mean nothing; what is refused, a GPU would refuse.

    python -m venv gpu && gpu/bin/pip install onnxruntime-gpu onnx onnx-ir onnxscript tokenizers typer rich jinja2
    pip install --target headers nvidia-cuda-runtime nvidia-cuda-crt
    python tests/gpu/stand_in/make.py gpu headers libraries
    LD_LIBRARY_PATH=libraries gpu/bin/python tests/gpu/stand_in/place.py BUNDLE
    LD_LIBRARY_PATH=libraries gpu/bin/python tests/gpu/kernels.py
"""

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


def compiled(source: str | Path, library: str, folder: Path, *flags: str, versioned: bool = True) -> None:
    script = folder / f"{library}.map"
    script.write_text(f"{library} {{ global: *; }};\n")
    file = source
    if isinstance(source, str):
        file = folder / f"{library}.c"
        Path(file).write_text(source)
    options = [f"-Wl,--version-script,{script}"] if versioned else []
    command = ["gcc", "-w", "-O1", "-shared", "-fPIC", *flags, f"-Wl,-soname,{library}", *options, str(file)]
    subprocess.run([*command, "-o", str(folder / library)], check=True)


def main() -> None:
    venv, headers, folder = map(Path, sys.argv[1:4])
    folder.mkdir(exist_ok=True)
    capi = next(venv.glob("lib/python3*/site-packages/onnxruntime/capi"))
    include = next(headers.glob("nvidia/*/include/cuda_runtime_api.h")).parent
    cuda, tensorrt = (undefined(capi / f"libonnxruntime_providers_{name}.so") for name in ("cuda", "tensorrt"))
    for library, symbols in cuda.items():
        if library.startswith("libcublas"):
            compiled(stub([*symbols, *tensorrt.get(library, [])]), library, folder)
        if library.startswith("libcudart"):
            compiled(Path(__file__).with_name("cudart.c"), library, folder, f"-I{include}")
    unversioned = tensorrt[""]  # TensorRT's few, and the driver's one, carry no version
    compiled(stub(["cuTensorMapEncodeTiled"]), "libcuda.so.1", folder, versioned=False)
    compiled(stub([]), "libcurand.so.10", folder, versioned=False)
    empty = "".join(f"void* {name}(void) {{ return 0; }}\n" for name in unversioned if name.startswith(("create", "get")))
    for library in ("libnvinfer.so.10", "libnvonnxparser.so.10"):
        compiled(empty, library, folder, versioned=False)
    compiled(stub(["cudnnCreate", "cudnnDestroy", "cudnnSetStream"]), "libcudnn.so.9", folder)


if __name__ == "__main__":
    main()

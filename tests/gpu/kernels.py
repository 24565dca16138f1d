"""Write the table of kernels that ONNX Runtime's CUDA provider registers (`exporter/lowering/cuda_kernels.json`).

With onnxruntime-gpu, on a machine with a GPU or over `stand_in`:  python tests/gpu/kernels.py
"""

import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent.parent.parent / "exporter" / "lowering" / "cuda_kernels.json"
PROVIDER = "CUDAExecutionProvider"
DOMAINS = {"": "", "com.microsoft": "com.microsoft::"}
NEWEST = 2**31 - 1  # the last version of a kernel for all versions to come
OPSET = 24  # of the canonical graphs: older kernels are left out

Row = list[Any]  # [first version, last version or null, {type constraint: types}]


def registered() -> dict[str, list[Row]]:
    """Operator -> its kernels."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found: dict[str, list[Row]] = {}
    kernels = []
    for kernel in state.get_all_opkernel_def():
        first, last = kernel.version_range
        if kernel.provider != PROVIDER or kernel.domain not in DOMAINS or (not kernel.domain and last < OPSET):
            continue
        types = {name: sorted(t.removeprefix("tensor(").rstrip(")") for t in k) for name, k in kernel.type_constraints.items()}
        kernels.append((DOMAINS[kernel.domain] + kernel.op_name, [first, None if last == NEWEST else last, types]))
    for name, row in sorted(kernels, key=str):  # the registry has no order of its own
        united(found.setdefault(name, []), row)
    return found


def united(rows: list[Row], new: Row) -> None:
    """Add a row, or widen one that differs in the types of one constraint alone."""
    for row in rows:
        if row[:2] == new[:2] and row[2].keys() == new[2].keys():
            differing = [name for name in new[2] if row[2][name] != new[2][name]]
            if len(differing) <= 1:
                for name in differing:
                    row[2][name] = sorted({*row[2][name], *new[2][name]})
                return
    rows.append(new)


def main() -> None:
    import onnxruntime

    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in registered().items())
    head = f'{{"onnxruntime": "{onnxruntime.__version__}", "provider": "{PROVIDER}", "kernels": {{\n'
    TABLE.write_text(f"{head}{lines}\n}}}}\n", "utf-8")


if __name__ == "__main__":
    main()

"""What a plan's own text states: its tensors, its kernels, and the types its weights are stored in.

A plan built ahead of time cannot be loaded without a GPU, so its inspector cannot be used. But the plan contains the compiled
graph as text, one line per tensor or step, as TensorRT-RTX 1.7.1 writes it. That text is undocumented: where no line of it
matches, everything here is empty, and the check is left to a GPU (tests/gpu).
"""

import re
from dataclasses import dataclass, field

from headstart.runtime.contract import updated

TENSOR = re.compile(
    rb'^  (?:sub_)?tensor=\{ ([^\n]*?dims=\{([^}\n]*)\}[^\n]*?name="([^"\n]+)"[^\n]*?type=(\w+)) \}', re.MULTILINE
)
PAYLOAD = re.compile(r"const_payload_size=(\d+)")
REGION = re.compile(r"region=\"?([^\s\"]+)")
STEP = re.compile(rb'^  (function|fully_connected)=\{ name="?([^\s"]+)"?', re.MULTILINE)
ENDS = re.compile(rb"^  (inputs|outputs)=\{([^}\n]*(?:\}\][^}\n]*)*)", re.MULTILINE)
NAME = re.compile(rb'"([^"]+)"')


@dataclass(frozen=True)
class PlanText:
    """Attributes:
    tensors: name -> (type, dimensions as written; a name stands for an open axis).
    weight_bytes: type -> bytes of the constants.
    kernels: kind -> how many steps, over all profiles: fused_attention, matmul, other.
    inputs, outputs: the names at the engine's ends. A cache that is updated in place has the same name in both.
    """

    tensors: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    inputs: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()


def read_plan(plan: "bytes | memoryview[int]") -> PlanText:
    """Empty when the plan holds no such text."""
    tensors, weights = _tensors(plan)
    kernels: dict[str, int] = {}
    for match in STEP.finditer(plan):
        kind = _kind(match.group(1), match.group(2))
        kernels[kind] = kernels.get(kind, 0) + 1
    ends: dict[bytes, set[str]] = {b"inputs": set(), b"outputs": set()}
    for match in ENDS.finditer(plan):
        ends[bytes(match.group(1))].update(_plain(name.decode()) for name in NAME.findall(match.group(2)))
    return PlanText(tensors, weights, kernels, frozenset(ends[b"inputs"]), frozenset(ends[b"outputs"]))


def _tensors(plan: "bytes | memoryview[int]") -> tuple[dict[str, tuple[str, tuple[str, ...]]], dict[str, int]]:
    """Tensors by name, and bytes of the constants by type: of the profile that lists most, for all share one copy."""
    tensors: dict[str, tuple[str, tuple[str, ...]]] = {}
    regions: dict[str, dict[str, dict[str, int]]] = {}
    for match in TENSOR.finditer(plan):
        line, dims, name, kind = (part.decode() for part in match.groups())
        tensors[name] = (kind, tuple(dims.replace('"', "").split()))
        payload, region = PAYLOAD.search(line), REGION.search(line)
        if payload and region:
            regions.setdefault(region.group(1), {}).setdefault(kind, {})[name] = int(payload.group(1))
    sums = [{kind: sum(sizes.values()) for kind, sizes in region.items()} for region in regions.values()]
    return tensors, max(sums, key=lambda by_type: sum(by_type.values()), default={})


def in_place(text: PlanText) -> tuple[str, ...]:
    """The tensors that come in and go out in one buffer: the compiler has put the output's name where the input's was."""
    return tuple(sorted(name for name in text.inputs & text.outputs if name.endswith(updated(""))))


def _kind(step: bytes, name: bytes) -> str:
    if step == b"fully_connected":
        return "matmul"
    return "fused_attention" if b"mha" in name else "other"


def _plain(name: str) -> str:
    """Without the profile and the number that the compiler adds: "logits [profile 1].1" is logits."""
    return re.sub(r"( \[profile \d+\])?\.\d+$", "", name)

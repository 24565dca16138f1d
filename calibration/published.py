"""Published speeds of speculative decoding on edge GPUs, batch 1 and 8: what the cost model is fitted to and tested on.

NVIDIA, TensorRT-Edge-LLM 0.9.0, performance benchmarks (JetPack 7.2; MTBench, COCO for Qwen3-VL). Sizes are computed from the
models' published dimensions; those of Qwen3.5 and of the drafters are estimates. The page does not say for each row how LM
heads and drafters were stored; we assume float16 LM heads with INT4 layers, and NVFP4 throughout with NVFP4 layers, under
which the rounds follow from bytes and operations alone. One row is omitted: a mixture of experts, whose bytes grow with the
rows.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSize:
    """Weights in millions: of the layers, of the LM head, and of the drafter of each published method without its LM head."""

    body: float
    lm_head: float
    layers: int
    eagle_draft: float = 0.0
    eagle_head: float = 0.0
    mtp_draft: float = 0.0
    dflash_draft: float = 0.0


MODELS = {
    "Qwen3-8B": ModelSize(6946, 622, 36, eagle_draft=268, eagle_head=131, dflash_draft=1050),
    "Qwen3-1.7B": ModelSize(1409, 311, 28, eagle_draft=71, eagle_head=66),
    "Qwen3-VL-4B": ModelSize(3633, 389, 36, eagle_draft=121, eagle_head=82),
    "Qwen3.5-27B": ModelSize(24300, 1271, 64, mtp_draft=400),
    "Qwen3.5-4B": ModelSize(3570, 636, 32, mtp_draft=112, dflash_draft=560),
    "Qwen3.5-2B": ModelSize(1370, 509, 24, mtp_draft=64),
    "Qwen3.5-0.8B": ModelSize(498, 254, 24, mtp_draft=23),
}


@dataclass(frozen=True)
class Row:
    """One published pair: tokens/s of plain and of speculative decoding, and the acceptance length of the latter."""

    device: str
    model: str
    weights: str  # int4 | nvfp4
    method: str  # eagle3 | mtp | dflash
    batch: int
    plain: float
    speculative: float
    acceptance: float

    @property
    def speedup(self) -> float:
        return self.speculative / self.plain


THOR, AGX, NX, NANO = "jetson-thor", "jetson-agx-orin-64gb", "jetson-orin-nx-16gb", "jetson-orin-nano-8gb"
ROWS = (
    Row(THOR, "Qwen3-8B", "nvfp4", "eagle3", 1, 46.8, 160.5, 4.24),
    Row(THOR, "Qwen3-8B", "nvfp4", "eagle3", 8, 283.1, 488.5, 4.12),
    Row(THOR, "Qwen3-8B", "int4", "eagle3", 1, 49.3, 77.1, 4.22),
    Row(THOR, "Qwen3-8B", "int4", "eagle3", 8, 191.8, 107.7, 4.20),
    Row(THOR, "Qwen3-1.7B", "nvfp4", "eagle3", 1, 154.2, 351.6, 3.04),
    Row(THOR, "Qwen3-VL-4B", "nvfp4", "eagle3", 1, 79.4, 258.3, 4.48),
    Row(THOR, "Qwen3.5-4B", "nvfp4", "mtp", 1, 69.4, 144.1, 2.55),
    Row(THOR, "Qwen3.5-4B", "int4", "mtp", 1, 67.5, 83.1, 2.55),
    Row(THOR, "Qwen3.5-27B", "nvfp4", "mtp", 1, 14.8, 37.6, 2.84),
    Row(THOR, "Qwen3-8B", "nvfp4", "dflash", 1, 46.8, 87.1, 3.24),
    Row(THOR, "Qwen3.5-4B", "nvfp4", "dflash", 1, 69.4, 73.8, 2.27),
    Row(AGX, "Qwen3-8B", "int4", "eagle3", 1, 32.5, 59.3, 4.22),
    Row(AGX, "Qwen3-8B", "int4", "eagle3", 8, 151.5, 72.6, 4.21),
    Row(AGX, "Qwen3-1.7B", "int4", "eagle3", 1, 98.6, 128.2, 3.18),
    Row(AGX, "Qwen3-VL-4B", "int4", "eagle3", 1, 52.4, 96.2, 4.95),
    Row(AGX, "Qwen3.5-0.8B", "int4", "mtp", 1, 146.0, 130.7, 2.06),
    Row(AGX, "Qwen3.5-4B", "int4", "mtp", 1, 45.7, 54.8, 2.53),
    Row(NX, "Qwen3-8B", "int4", "eagle3", 1, 19.0, 30.7, 4.18),
    Row(NX, "Qwen3-1.7B", "int4", "eagle3", 1, 60.4, 73.5, 3.19),
    Row(NX, "Qwen3.5-0.8B", "int4", "mtp", 1, 88.7, 74.5, 2.07),
    Row(NX, "Qwen3.5-2B", "int4", "mtp", 1, 48.9, 47.7, 2.41),
    Row(NANO, "Qwen3-1.7B", "int4", "eagle3", 1, 37.4, 41.2, 3.19),
    Row(NANO, "Qwen3.5-0.8B", "int4", "mtp", 1, 55.3, 45.0, 2.07),
)

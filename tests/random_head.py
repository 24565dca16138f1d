"""A draft head of random weights, for tests that need one and do not mind what it proposes."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from headstart.exporter.heads.install import import_head


def add_random_head(bundle: Path, folder: Path, hidden: int = 64) -> None:
    """Import a Medusa head of two future tokens, of which 5 candidates each, that projects with the target's own LM head.

    `folder` is made for the head's checkpoint.
    """
    folder.mkdir()
    torch.manual_seed(0)
    shapes = {"weight": (hidden, hidden), "bias": (hidden,)}
    tensors = {f"{i}.0.linear.{part}": torch.randn(*shape) for i in range(2) for part, shape in shapes.items()}
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    import_head(bundle, folder, "medusa", 5)

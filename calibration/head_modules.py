"""Independent draft heads as they are trained: residual blocks, and a projection onto the vocabulary."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

FEED_FORWARD = 4  # times the hidden size is the width of a feed-forward block, as in the Transformer itself


class MedusaBlock(nn.Module):
    """x + SiLU(A x + b), from A = 0 and b = 0."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + nn.functional.silu(self.linear(hidden))


class FeedForwardBlock(nn.Module):
    """x + wo(ReLU(wi(x))), from wo = 0: the block of blockwise parallel decoding (arXiv 1811.03115)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.wi = nn.Linear(hidden, FEED_FORWARD * hidden)
        self.wo = nn.Linear(FEED_FORWARD * hidden, hidden)
        nn.init.zeros_(self.wo.weight)
        nn.init.zeros_(self.wo.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.wo(nn.functional.relu(self.wi(hidden)))


@dataclass(frozen=True)
class Family:
    """What the heads of a family are made of, and under which names they are saved."""

    block: Callable[[int], nn.Module]
    prefix: str
    file: str


FAMILIES = {
    "medusa": Family(MedusaBlock, "", "medusa_lm_head.safetensors"),
    "blockwise": Family(FeedForwardBlock, "blockwise_heads.", "blockwise_heads.safetensors"),
}


class Head(nn.Module):
    """Residual blocks and, when not shared, a projection. Starts as the base's own LM head: blocks that add 0, W = W_base."""

    def __init__(self, base: Tensor, layers: int, own_projection: bool, family: str = "medusa") -> None:
        """`base`: [V, H] the base's LM head, or those of its rows that are drafted."""
        super().__init__()
        vocab_size, hidden = base.shape
        self.blocks = nn.Sequential(*(FAMILIES[family].block(hidden) for _ in range(layers)))
        self.projection = nn.Linear(hidden, vocab_size, bias=False) if own_projection else None
        if self.projection is not None:
            self.projection.weight.data.copy_(base)
        else:
            self.base = base  # not a parameter: frozen

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H] to logits [N, V]."""
        state = self.blocks(hidden)
        return self.projection(state) if self.projection is not None else state @ self.base.T

"""Draft heads as they are trained: residual blocks, and a projection onto the vocabulary."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DROPOUT = 0.2  # of what a Hydra head reads, as published; without it, a few hundred thousand tokens are learnt by heart
SAMPLE = 4096  # rows whose sizes are compared
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
class Block:
    """What independent heads of a family are made of, and the prefix of their tensors' names."""

    block: Callable[[int], nn.Module]
    prefix: str = ""


@dataclass(frozen=True)
class Base:
    """What heads take of their frozen base.

    Attributes:
        lm_head: [V, H], or those of its rows that are drafted.
        embeddings: [V, H] the table that tokens are looked up in, as it is stored.
        ratio: how much larger hidden states are than its rows.
    """

    lm_head: Tensor
    embeddings: Tensor
    ratio: float = 1.0

    @classmethod
    def of(cls, model: Any, hidden: Tensor) -> "Base":
        """`hidden`: states of a text, [N, T, H]."""
        lm_head, table = (layer.weight.detach() for layer in (model.get_output_embeddings(), model.get_input_embeddings()))
        states, rows = _sample(hidden.flatten(0, 1)), _sample(table)
        return cls(lm_head.float().clone(), table.clone(), float((states.square().mean() / rows.square().mean()).sqrt()))


def _sample(rows: Tensor) -> Tensor:
    return rows[:: max(1, len(rows) // SAMPLE)].float()


class Head(nn.Module):
    """Residual blocks and, when not shared, a projection. Starts as the base's own LM head: blocks that add 0, W = W_base."""

    def __init__(self, base: Base, layers: int, own_projection: bool, kind: Block) -> None:
        super().__init__()
        hidden = base.lm_head.shape[1]
        self._prefix = kind.prefix
        self.blocks = nn.Sequential(*(kind.block(hidden) for _ in range(layers)))
        self.projection = own_matrix(base.lm_head) if own_projection else None
        self._lm_head = base.lm_head  # not a parameter: frozen

    def forward(self, hidden: Tensor, read: Tensor) -> Tensor:
        """[N, H] to logits [N, V]; the tokens read are not looked at."""
        state = self.blocks(hidden)
        return self.projection(state) if self.projection is not None else state @ self._lm_head.T

    def published(self, number: int) -> dict[str, Tensor]:
        """The tensors of head `number` by their published names."""
        tensors = {f"{self._prefix}{number}.{name}": tensor for name, tensor in self.blocks.state_dict().items()}
        if self.projection is not None:
            tensors[f"{self._prefix}{number}.{len(self.blocks)}.weight"] = self.projection.weight
        return tensors


def own_matrix(rows: Tensor) -> nn.Linear:
    """A projection onto the vocabulary that starts as these rows of the base's."""
    projection = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
    projection.weight.data.copy_(rows)
    return projection


class HydraHead(nn.Module):
    """Hydra's head number i (arXiv 2402.05109): it reads the state and the i + 1 tokens after it, see `exporter.heads.hydra`.

    Starts as the base's own LM head on the state alone. In training, embeddings are as large as the states; what is saved reads
    them as they are.
    """

    def __init__(self, base: Base, number: int, layers: int, own_projection: bool) -> None:
        super().__init__()
        hidden, width = base.lm_head.shape[1], (number + 2) * base.lm_head.shape[1]
        self.dropout = nn.Dropout(DROPOUT)
        self.residual = nn.Linear(width, hidden)
        self.blocks = nn.ModuleList(nn.Linear(width if layer == 0 else hidden, hidden) for layer in range(layers))
        self.projection = own_matrix(base.lm_head) if own_projection else None
        for linear in (self.residual, *self.blocks):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.residual.weight.data[:, :hidden] = torch.eye(hidden)
        self._base = base

    def forward(self, hidden: Tensor, read: Tensor) -> Tensor:
        """[N, H] states and [N, i + 1] tokens to logits [N, V]."""
        embedded = self._base.ratio * self._base.embeddings[read].float()
        state = self.dropout(torch.cat([hidden, embedded.flatten(1)], dim=-1))
        for layer, block in enumerate(self.blocks):
            state = (self.residual(state) if layer == 0 else state) + nn.functional.silu(block(state))
        return self.projection(state) if self.projection is not None else state @ self._base.lm_head.T

    def published(self, number: int) -> dict[str, Tensor]:
        """The tensors of head `number` by their published names."""
        prefix = f"hydra_mlp.{number}"
        tensors = {f"{prefix}.0.res_connection.weight": self._unscaled(self.residual.weight)}
        tensors[f"{prefix}.0.res_connection.bias"] = self.residual.bias
        for layer, block in enumerate(self.blocks):
            tensors[f"{prefix}.{layer}.linear.weight"] = self._unscaled(block.weight) if layer == 0 else block.weight
            tensors[f"{prefix}.{layer}.linear.bias"] = block.bias
        if self.projection is not None:
            tensors[f"hydra_lm_head.{number}.weight"] = self.projection.weight
        return tensors

    def _unscaled(self, weight: Tensor) -> Tensor:
        """Of the columns that read embeddings."""
        hidden = self._base.lm_head.shape[1]
        return torch.cat([weight[:, :hidden], self._base.ratio * weight[:, hidden:]], dim=1)


MEDUSA, BLOCKWISE = Block(MedusaBlock), Block(FeedForwardBlock, "blockwise_heads.")


@dataclass(frozen=True)
class Family:
    """How the heads of a family are made and saved.

    Attributes:
        head: a head of its own for each number, of a base, its number, layers, and whether it has a projection of its own.
        file: of the weights.
        token_map: the name of the tensor that lists what is drafted, where that is a part of the vocabulary.
        config: what config.json says of so many heads of so many layers.
    """

    head: Callable[[Base, int, int, bool], nn.Module]
    file: str
    token_map: str
    config: Callable[[int, int], dict[str, Any]]


def _medusa_config(heads: int, layers: int) -> dict[str, Any]:
    return {"medusa_num_heads": heads, "medusa_num_layers": layers}


def _hydra_config(heads: int, layers: int) -> dict[str, Any]:
    return {"hydra_num_heads": heads, "hydra_num_layers": layers, "hydra_head_arch": "mlp", "grounded_heads": True}


def _independent(kind: Block) -> Callable[[Base, int, int, bool], nn.Module]:
    return lambda base, number, layers, own_projection: Head(base, layers, own_projection, kind)


FAMILIES = {
    "medusa": Family(_independent(MEDUSA), "medusa_lm_head.safetensors", "token_map", _medusa_config),
    "blockwise": Family(_independent(BLOCKWISE), "blockwise_heads.safetensors", "blockwise_heads.token_map", _medusa_config),
    "hydra": Family(HydraHead, "hydra_lm_head.safetensors", "hydra_token_map", _hydra_config),
}

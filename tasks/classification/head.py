"""Heads of a classifier: from the states of an encoder's layers to a logit for each class.

Shape legend: B examples, L layers, N tokens (patches or frames), D width, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import HeadConfig


class LayerSum(nn.Module):
    """Σ_l softmax(w)_l x_l over the states of L layers (SUPERB, Yang et al. 2021, section 3.2).

    At first it is their mean.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers))

    def forward(self, states: list[Tensor]) -> Tensor:
        """Returns the weighted sum of L tensors of one shape, in that shape."""
        shares = self.weight.softmax(dim=0)
        total = shares[0] * states[0]
        for share, state in zip(shares[1:], states[1:], strict=True):
            total = total + share * state
        return total


class AttentionPool(nn.Module):
    """softmax(q Kᵀ / √d) V Wᵒ with a learned query q in each head and K, V of normalised tokens.

    Args:
        width: D.
        heads: must divide D.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"{heads} heads of attention pooling do not divide the encoder's width, {width}; "
                "set head.heads"
            )
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(1, heads, 1, width // heads) * 0.02)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pools tokens (B, N, D) to (B, D).

        Args:
            tokens: (B, N, D).
            mask: (B, N), true for a token that is no padding.
        """
        batch, length, width = tokens.shape
        heads = self.query.shape[1]
        pairs = self.key_value(self.norm(tokens)).view(batch, length, 2, heads, width // heads)
        key, value = pairs.permute(2, 0, 3, 1, 4)
        query = self.query.to(key.dtype).expand(batch, -1, -1, -1)
        attention = None if mask is None else mask[:, None, None]
        pooled = F.scaled_dot_product_attention(query, key, value, attn_mask=attention)
        return self.out(pooled.flatten(1))


class MeanPool(nn.Module):
    """The mean of the tokens that are no padding. It has no parameters."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pools tokens (B, N, D) to (B, D).

        Args:
            tokens: (B, N, D).
            mask: (B, N), true for a token that is no padding.
        """
        if mask is None:
            return tokens.mean(dim=1)
        # Padding may hold any value, also infinity, so multiplying by 0 would not remove it.
        tokens = tokens.masked_fill(~mask[:, :, None], 0)
        return tokens.sum(dim=1) / mask.sum(dim=1, keepdim=True)


class ClassificationHead(nn.Module):
    """Layer weights, pooling and the layers that map features to classes.

    Args:
        config: of the head.
        width: D.
        layers: L, the number of states that the head reads.
        classes: C.
    """

    def __init__(self, config: HeadConfig, *, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.sum = LayerSum(layers) if config.layers == "all" else None
        self.pool = (
            AttentionPool(width, config.heads) if config.pooling == "attention" else MeanPool()
        )
        if config.kind == "linear":
            self.classifier = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(width, classes))
        else:
            hidden = config.hidden or width
            self.classifier = nn.Sequential(
                nn.Dropout(config.dropout),
                nn.Linear(width, hidden),
                nn.GELU(),
                nn.Dropout(config.dropout),
                nn.Linear(hidden, classes),
            )

    def forward(
        self,
        states: list[Tensor] | None,
        mask: Tensor | None = None,
        *,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """Returns logits (B, C) in float32.

        Args:
            states: (B, N, D) for each layer.
            mask: (B, N), true for a token that is no padding.
            pooled: (B, D) pooled by the encoder itself, in place of states.
        """
        if pooled is None:
            assert states is not None
            pooled = self.pool(states[-1] if self.sum is None else self.sum(states), mask)
        return self.classifier(pooled).float()

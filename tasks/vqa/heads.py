"""Classifiers over the answers, on the two towers of a frozen CLIP.

Shape legend: B questions, A answers, E width of the shared space, N image tokens, L text tokens,
W width of the head, H heads, D width of a tower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VQAHeadConfig


def _even(embedding: Tensor) -> Tensor:
    """Returns embeddings (…, E) with features of size about 1, whatever the encoder's scale."""
    return F.normalize(embedding, dim=-1) * embedding.shape[-1] ** 0.5


class FusionHead(nn.Module):
    """An MLP on [v, t, v ⊙ t, |v − t|] of the two embeddings."""

    def __init__(self, width: int, answers: int, config: VQAHeadConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(4 * width, config.width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.width, config.width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.width, answers),
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Returns logits (B, A) of embeddings (B, E) of images and of texts."""
        v, t = _even(image), _even(text)
        return self.mlp(torch.cat([v, t, v * t, (v - t).abs()], dim=-1))


class BilinearHead(nn.Module):
    """Low-rank bilinear pooling (MFB: Yu et al. 2017, eq. 3 and 6).

    Each of the W features is the sum of `factors` products of a projection of the image with a
    projection of the text. The pooled features get unit length as in the paper. Then they are
    scaled by √W, because else the classifier's logits would be too small to learn from.
    """

    def __init__(self, width: int, answers: int, config: VQAHeadConfig) -> None:
        super().__init__()
        self.factors = config.factors
        self.image = nn.Linear(width, config.factors * config.width)
        self.text = nn.Linear(width, config.factors * config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.width, answers)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Returns logits (B, A) of embeddings (B, E) of images and of texts."""
        products = self.dropout(self.image(_even(image)) * self.text(_even(text)))
        pooled = products.unflatten(-1, (-1, self.factors)).sum(dim=-1)
        # The square root's slope has no bound at 0.
        rooted = pooled.sign() * ((pooled.abs() + 1e-6).sqrt() - 1e-3)
        return self.classifier(_even(rooted))


class Attention(nn.Module):
    """Multi-head attention of queries (B, Q, W) over states (B, K, W).

    A mask (B, K) is True for states that are no padding.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self._split(self.query(queries))
        k, v = (self._split(part) for part in self.key_value(states).chunk(2, dim=-1))
        seen = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _split(self, states: Tensor) -> Tensor:
        """Reshapes (B, Q, W) to (B, H, Q, W / H)."""
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CoAttentionLayer(nn.Module):
    """Self-attention, then attention over a guide if `guided`, then an MLP.

    These are the SA and SGA units of MCAN (Yu et al. 2019, §3.1), but with the normalisation before
    each part instead of after it.
    """

    def __init__(self, width: int, config: VQAHeadConfig, *, guided: bool) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, config.heads)
        self.guided_norm = nn.LayerNorm(width) if guided else None
        self.guided = Attention(width, config.heads) if guided else None
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(4 * width, width),
        )

    def forward(
        self,
        states: Tensor,
        mask: Tensor | None = None,
        *,
        guide: Tensor | None = None,
        guide_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns states (B, Q, W).

        Args:
            states: (B, Q, W).
            mask: (B, Q), True for states that are no padding.
            guide: (B, K, W) states to attend to; needed if the layer is guided.
            guide_mask: (B, K), True for states of the guide that are no padding.
        """
        normed = self.norm(states)
        states = states + self.dropout(self.attention(normed, normed, mask))
        if self.guided is not None and self.guided_norm is not None:
            assert guide is not None
            attended = self.guided(self.guided_norm(states), guide, guide_mask)
            states = states + self.dropout(attended)
        return states + self.dropout(self.mlp(self.mlp_norm(states)))


class AttentionPooling(nn.Module):
    """The mean of the states by learned weights (MCAN's attentional reduction, §3.4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scores = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pools states (B, K, W) to (B, W); the mask (B, K) is True for what is no padding."""
        scores = self.scores(states).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(dim=-1)[:, None] @ states).squeeze(1)


class CoAttentionHead(nn.Module):
    """MCAN's encoder-decoder on the token states of the two towers.

    Layers over the text are followed by as many layers over the image, which the text guides. Both
    results are pooled by attention, added and classified.
    """

    def __init__(
        self, image_width: int, text_width: int, answers: int, config: VQAHeadConfig
    ) -> None:
        super().__init__()
        width = config.width
        self.image = nn.Sequential(nn.LayerNorm(image_width), nn.Linear(image_width, width))
        self.text = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.text_layers = nn.ModuleList(
            CoAttentionLayer(width, config, guided=False) for _ in range(config.layers)
        )
        self.image_layers = nn.ModuleList(
            CoAttentionLayer(width, config, guided=True) for _ in range(config.layers)
        )
        self.text_norm, self.image_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.text_pooling, self.image_pooling = AttentionPooling(width), AttentionPooling(width)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, answers)

    def forward(
        self,
        images: Tensor,
        texts: Tensor,
        mask: Tensor,
        *,
        image_of: Tensor,
        text_of: Tensor,
    ) -> Tensor:
        """Returns logits (B, A) of B questions, which share images and texts.

        Args:
            images: (I, N, D), each image once.
            texts: (T, L, D), each text once.
            mask: (T, L), True for tokens that are no padding.
            image_of: (B,) the number of a question's image.
            text_of: (B,) the number of a question's text.
        """
        text = self.text(texts)
        for layer in self.text_layers:
            text = layer(text, mask)
        text = self.text_norm(text)
        pooled_text = self.text_pooling(text, mask)[text_of]
        guide, guide_mask = text[text_of], mask[text_of]
        image = self.image(images)[image_of]
        for layer in self.image_layers:
            image = layer(image, guide=guide, guide_mask=guide_mask)
        pooled_image = self.image_pooling(self.image_norm(image))
        return self.classifier(self.norm(pooled_text + pooled_image))

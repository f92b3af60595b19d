"""An image-text encoder with the retrieval head: embeddings, losses and matching scores.

Shape legend: B pairs, E width of the embeddings, N image tokens, D width of the image tower,
L text tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapters import AdapterModel

from ..core.model import TaskModel
from ..encoders.blip import BlipMatcher, is_blip
from ..encoders.clip import ClipTowers
from ..encoders.refusals import refuse_other_towers, refuse_unpaired
from .config import RetrievalConfig
from .head import RetrievalHead
from .loss import contrastive_loss, hard_negatives, in_chunks


class RetrievalModel(TaskModel):
    """An image-text encoder with the retrieval head.

    `forward` returns the loss of pairs; `images` and `texts` return unit vectors.

    Raises:
        ValueError: the encoder does not compare images with texts, or an adapter is at a site that
            retrieval does not pass.
    """

    head: RetrievalHead

    def __init__(self, encoder: AdapterModel, config: RetrievalConfig) -> None:
        blip = is_blip(encoder.backbone)
        towers: BlipMatcher | ClipTowers = BlipMatcher(encoder) if blip else ClipTowers(encoder)
        matching = blip and config.loss.matching > 0
        used = {"vision", "text", *(["fusion"] if matching else [])}
        refuse_unpaired(encoder, "retrieval")
        refuse_other_towers(encoder, used, "retrieval")
        super().__init__(encoder, _head(towers, config, matching=matching))
        self.towers = towers
        self.loss = config.loss

    @property
    def matcher(self) -> BlipMatcher | None:
        """The towers of BLIP, which also matches pairs; None for encoders that only embed."""
        return self.towers if isinstance(self.towers, BlipMatcher) else None

    def images(self, pixels: Tensor) -> Tensor:
        """Returns embeddings (B, E), float32 of unit length, of pixels (B, 3, H, W)."""
        return self.head.images(self.towers.images(pixels))

    def texts(self, tokens: Tensor) -> Tensor:
        """Returns embeddings (B, E), float32 of unit length, of tokens (B, L) int64."""
        return self.head.texts(self.towers.texts(tokens))

    def forward(
        self, pixels: Tensor, tokens: Tensor, image_ids: Tensor, text_ids: Tensor
    ) -> dict[str, Tensor]:
        """Returns the losses of pairs (pixels[i], tokens[i]).

        Args:
            pixels: (B, 3, H, W).
            tokens: (B, L) int64.
            image_ids: (B,) int64; equal ids are the same image.
            text_ids: (B,) int64; equal ids are the same text.

        Returns:
            "loss" and its parts "contrastive" and, with BLIP, "matching"; float32 scalars.
        """
        size = self.loss.chunk_size
        matcher, image_tokens = self.matcher, None
        if matcher is not None and self.loss.matching > 0:
            images, image_tokens = in_chunks(self._image_and_tokens, pixels, size)
        else:
            images = in_chunks(self.images, pixels, size)
        texts = in_chunks(self.texts, tokens, size)
        scale = self.head.scale
        with torch.autocast(pixels.device.type, enabled=False):
            contrastive = contrastive_loss(
                images,
                texts,
                image_ids,
                text_ids,
                scale=scale,
                bias=self.head.logit_bias,
                same_image=self.loss.same_image,
            )
        if image_tokens is None:
            return {"loss": contrastive, "contrastive": contrastive.detach()}
        same = (image_ids[:, None] == image_ids) | (text_ids[:, None] == text_ids)
        matching = self._matching_loss(image_tokens, tokens, scale * images @ texts.T, same)
        loss = contrastive + self.loss.matching * matching
        return {
            "loss": loss,
            "contrastive": contrastive.detach(),
            "matching": matching.detach(),
        }

    def match_tokens(self, pixels: Tensor) -> Tensor:
        """Returns image tokens (B, N, D) for `match`, of pixels (B, 3, H, W)."""
        assert self.matcher is not None
        return self.matcher.image_tokens(pixels)

    def _image_and_tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        assert self.matcher is not None
        image_tokens = self.matcher.image_tokens(pixels)
        return self.head.images(self.matcher.images_of(image_tokens)), image_tokens

    def match(self, image_tokens: Tensor, tokens: Tensor) -> Tensor:
        """Returns logits (B, 2) of BLIP's matching, pair by pair.

        Args:
            image_tokens: (B, N, D).
            tokens: (B, L) int64, as for `texts`.
        """
        assert self.matcher is not None
        return self.matcher.match(
            image_tokens, self.with_image(tokens), itm_head=self.head.itm_head
        )

    def with_image(self, tokens: Tensor) -> Tensor:
        """Returns tokens (B, L) of texts with the start token for reading them with an image."""
        assert self.matcher is not None
        begin = self.matcher.tokens.encode
        if begin is None:
            return tokens
        return torch.cat([torch.full_like(tokens[:, :1], begin), tokens[:, 1:]], dim=1)

    def _matching_loss(
        self, image_tokens: Tensor, tokens: Tensor, logits: Tensor, same: Tensor
    ) -> Tensor:
        """Returns the mean cross-entropy of right pairs and hard wrong ones.

        They are every pair, every image with a hard wrong text, and every text with a hard wrong
        image (Li et al. 2022, §3.2). Negatives come from the pairs of this process only.

        Args:
            image_tokens: (B, N, D).
            tokens: (B, L) int64.
            logits: (B, B) by which negatives are drawn.
            same: (B, B) bool, for pairs with the same image or the same text.
        """
        numbers = torch.arange(len(tokens), device=tokens.device)
        wrong_text, there = hard_negatives(logits, same)
        wrong_image, _ = hard_negatives(logits.T, same)
        keep = numbers[there]
        image_of = torch.cat([numbers, keep, wrong_image[there]])
        text_of = torch.cat([numbers, wrong_text[there], keep])
        labels = torch.cat([torch.ones_like(numbers), torch.zeros_like(torch.cat([keep, keep]))])

        def encode(pairs: Tensor) -> Tensor:
            images, texts = pairs.unbind(dim=1)
            return self.match(image_tokens[images], tokens[texts])

        pairs = torch.stack([image_of, text_of], dim=1)
        return F.cross_entropy(in_chunks(encode, pairs, self.loss.chunk_size).float(), labels)


def _head(
    towers: BlipMatcher | ClipTowers, config: RetrievalConfig, *, matching: bool
) -> RetrievalHead:
    bias = None
    if config.loss.kind == "sigmoid":
        trained = getattr(towers, "logit_bias", None)
        bias = torch.tensor(config.loss.bias) if trained is None else trained
    backbone: Any = towers.encoder.backbone
    return RetrievalHead(
        towers.width,
        config.head,
        logit_scale=towers.logit_scale,
        logit_bias=bias,
        itm_head=backbone.itm_head if matching else None,
    )

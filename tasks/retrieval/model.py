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
    """`forward` gives the loss of pairs; `images` and `texts` give unit vectors.

    Raises:
        ValueError: the encoder does not compare images with texts, or the adapter sits where
            retrieval never passes.
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
        """BLIP's two stages, None for encoders that only embed."""
        return self.towers if isinstance(self.towers, BlipMatcher) else None

    def images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E) float32 of unit length."""
        return self.head.images(self.towers.images(pixels))

    def texts(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> (B, E) float32 of unit length."""
        return self.head.texts(self.towers.texts(tokens))

    def forward(
        self, pixels: Tensor, tokens: Tensor, image_ids: Tensor, text_ids: Tensor
    ) -> dict[str, Tensor]:
        """The losses of pairs (pixels[i], tokens[i]).

        Args:
            pixels: (B, 3, H, W).
            tokens: (B, L) int64.
            image_ids, text_ids: (B,) int64; equal ids are the same image or the same text.

        Returns:
            "loss", and "contrastive" and "matching" of which it is made, float32 scalars.
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
        """(B, 3, H, W) -> what `match` reads of images, (B, N, D)."""
        assert self.matcher is not None
        return self.matcher.image_tokens(pixels)

    def _image_and_tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        assert self.matcher is not None
        image_tokens = self.matcher.image_tokens(pixels)
        return self.head.images(self.matcher.images_of(image_tokens)), image_tokens

    def match(self, image_tokens: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, 2) of BLIP's matching for images (B, N, D) and texts (B, L), pair by pair."""
        assert self.matcher is not None
        return self.matcher.match(
            image_tokens, self.with_image(tokens), itm_head=self.head.itm_head
        )

    def with_image(self, tokens: Tensor) -> Tensor:
        """(B, L) of texts that are read alone -> as they are read together with an image."""
        assert self.matcher is not None
        begin = self.matcher.tokens.encode
        if begin is None:
            return tokens
        return torch.cat([torch.full_like(tokens[:, :1], begin), tokens[:, 1:]], dim=1)

    def _matching_loss(
        self, image_tokens: Tensor, tokens: Tensor, logits: Tensor, same: Tensor
    ) -> Tensor:
        """Cross-entropy of every pair, every image with a hard wrong text, and every text with a
        hard wrong image (Li et al. 2022, §3.2), from among this process's own pairs."""
        own = torch.arange(len(tokens), device=tokens.device)
        wrong_text, there = hard_negatives(logits, same)
        wrong_image, _ = hard_negatives(logits.T, same)
        keep = own[there]
        image_of = torch.cat([own, keep, wrong_image[there]])
        text_of = torch.cat([own, wrong_text[there], keep])
        labels = torch.cat([torch.ones_like(own), torch.zeros_like(torch.cat([keep, keep]))])

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
        own = getattr(towers, "logit_bias", None)
        bias = torch.tensor(config.loss.bias) if own is None else own
    backbone: Any = towers.encoder.backbone
    return RetrievalHead(
        towers.width,
        config.head,
        logit_scale=towers.logit_scale,
        logit_bias=bias,
        itm_head=backbone.itm_head if matching else None,
    )

"""Question answering by a classifier on the two towers of a CLIP.

Shape legend: B questions, I images, T texts, L text tokens, A answers.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmadapters import AdapterModel

from ..core.model import TaskModel
from ..encoders.clip import ClipTowers
from ..encoders.refusals import refuse_embedding_adapters
from .config import VQAHeadConfig
from .heads import BilinearHead, CoAttentionHead, FusionHead


class ClipVQA(TaskModel):
    """An image-text encoder with a classifier over answers.

    Args:
        encoder: with its adapters.
        config: of the head.
        answers: A.
        binary: whether each answer is right or wrong by itself (a sigmoid); else one answer is
            right (a softmax).
    """

    def __init__(
        self, encoder: AdapterModel, config: VQAHeadConfig, *, answers: int, binary: bool
    ) -> None:
        towers = ClipTowers(encoder)
        head: nn.Module
        if config.kind == "coattention":
            refuse_embedding_adapters(encoder, "head.kind coattention")
            head = CoAttentionHead(towers.image_width, towers.text_width, answers, config)
        elif config.kind == "bilinear":
            head = BilinearHead(towers.width, answers, config)
        else:
            head = FusionHead(towers.width, answers, config)
        super().__init__(encoder, head)
        self.towers = towers
        self.binary = binary

    def forward(
        self,
        pixels: Tensor,
        tokens: Tensor,
        image_of: Tensor,
        text_of: Tensor,
        targets: Tensor | None = None,
        references: Any = None,
    ) -> dict[str, Tensor]:
        """Returns "logits" (B, A), and "loss" if there are targets.

        Args:
            pixels: (I, 3, H, W), each image once.
            tokens: (T, L), each question's text once.
            image_of: (B,) the number of a question's image.
            text_of: (B,) the number of a question's text.
            targets: (B, A) scores of the answers, from 0 to 1. They are all 0 if no right answer is
                in the vocabulary, and a softmax does not learn from them then.
            references: not used; batches have it for evaluation.
        """
        logits = self.logits(pixels, tokens, image_of, text_of).float()
        if targets is None:
            return {"logits": logits}
        return {"logits": logits, "loss": classifier_loss(logits, targets, binary=self.binary)}

    def logits(self, pixels: Tensor, tokens: Tensor, image_of: Tensor, text_of: Tensor) -> Tensor:
        """Returns logits (B, A); the arguments are those of `forward`."""
        towers, encoder = self.towers, self.encoder
        coattention = isinstance(self.head, CoAttentionHead)
        with encoder.paired() as pair:
            images = towers.image_tokens(pixels) if coattention else towers.images(pixels)
        with contextlib.ExitStack() as stack:
            if encoder.looks_at_images:
                # The states of a question then depend on its image.
                assert pair.tokens is not None
                stack.enter_context(encoder.looking_at(pair.tokens[image_of]))
                tokens, text_of = tokens[text_of], torch.arange(len(text_of), device=text_of.device)
            if coattention:
                texts, mask = towers.text_tokens(tokens)
                return self.head(images, texts, mask, image_of=image_of, text_of=text_of)
            return self.head(images[image_of], towers.texts(tokens)[text_of])

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns the probabilities (B, A) that answers are right, of logits (B, A)."""
        return logits.sigmoid() if self.binary else logits.softmax(dim=-1)


def classifier_loss(logits: Tensor, targets: Tensor, *, binary: bool) -> Tensor:
    """Returns the mean loss over questions.

    Questions without a known answer count too, so that the loss of a batch is the mean of those of
    its parts. If `binary`, the loss of a question is the sum over answers of the cross-entropies
    with soft targets (Teney et al. 2018, §4.6). Else it is the cross-entropy with the targets'
    shares of their sum.

    Args:
        logits: (B, A).
        targets: (B, A) from 0 to 1.
        binary: as in `ClipVQA`.
    """
    if binary:
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return losses.sum(dim=-1).mean()
    shares = targets / targets.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(targets.dtype).tiny)
    return -(shares * logits.log_softmax(dim=-1)).sum(dim=-1).mean()

"""Captions by BLIP's own decoder. Only the adapter is trained.

Shape legend: B rows, I images, M captions, N image tokens, T caption tokens, P tokens of the prompt
with [DEC], D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmadapters import AdapterModel

from ..core.model import TaskModel
from ..encoders.blip import LOGITS_AT_A_TIME
from ..encoders.blip_captioner import BlipCaptioner
from .config import CaptioningConfig


class CaptioningModel(TaskModel):
    """BLIP that writes captions; it has no head.

    Args:
        encoder: with its adapters.
        config: the loss and the decoding.
        prompt: (P,) int64, [DEC] and the tokens with which every caption begins.
    """

    def __init__(self, encoder: AdapterModel, config: CaptioningConfig, *, prompt: Tensor) -> None:
        captioner = BlipCaptioner(encoder)
        super().__init__(encoder, nn.Identity())
        self.captioner = captioner
        self.label_smoothing = config.loss.label_smoothing
        self.decoding = config.decoding
        self.prompt = prompt

    def forward(
        self,
        pixels: Tensor,
        tokens: Tensor,
        image_of: Tensor,
        weights: Tensor,
        references: Any = None,
    ) -> dict[str, Tensor]:
        """Returns as "loss" the weighted sum of the captions' mean losses per token.

        BLIP takes the mean over all tokens of a batch instead. There long captions weigh more, and
        the loss of a batch is not the mean of the losses of its parts.

        Args:
            pixels: (I, 3, H, W), each image once.
            tokens: (M, T): [DEC] prompt caption [SEP], padded.
            image_of: (M,) the number of a caption's image.
            weights: (M,), of sum 1.
            references: not used; batches have it for evaluation.
        """
        sums, counts = self.captioner.losses(
            self.captioner.image_tokens(pixels)[image_of],
            tokens,
            prompt=len(self.prompt),
            label_smoothing=self.label_smoothing,
        )
        return {"loss": (weights * sums / counts).sum()}

    def likelihoods(
        self, image_tokens: Tensor, tokens: Tensor, image_of: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the log-likelihood of each caption, (M,), and its number of tokens, (M,).

        Args:
            image_tokens: (I, N, D).
            tokens: (M, T) as in `forward`.
            image_of: (M,) as in `forward`.
        """
        step = max(1, LOGITS_AT_A_TIME // (tokens.shape[1] * self.captioner.tokens.vocabulary))
        parts = [
            self.captioner.losses(image_tokens[images], part, prompt=len(self.prompt))
            for images, part in zip(image_of.split(step), tokens.split(step), strict=True)
        ]
        sums, counts = (torch.cat(some) for some in zip(*parts, strict=True))
        return -sums, counts

    def generate(self, image_tokens: Tensor) -> Tensor:
        """Returns captions (I, T) of images (I, N, D), without the prompt, padded."""
        options = self.decoding
        room = self.captioner.tokens.context_length - len(self.prompt)
        return self.captioner.generate(
            image_tokens,
            self.prompt,
            beams=options.beams,
            max_tokens=min(options.max_tokens, room),
            min_tokens=min(options.min_tokens, room),
            length_penalty=options.length_penalty,
            repetition_penalty=options.repetition_penalty,
            no_repeat_ngram=options.no_repeat_ngram,
        )

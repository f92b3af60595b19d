"""BLIP of transformers as a captioner: likelihoods of captions, and generation.

The decoder takes image tokens directly, so an image is encoded once for all its captions and for
generation. All images have the same number of tokens, so it does not matter that transformers
ignores their mask in the cross-attention (see `blip`).

Shape legend: B images, M captions, N image tokens, T caption tokens, P tokens of the prompt with
[DEC], D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmadapters import AdapterModel

from .blip import IGNORED, image_tokens_of, require_blip
from .blip_text import BlipTokens, token_mask


class BlipCaptioner:
    """Captions images with a BlipForConditionalGeneration; has no parameters of its own.

    Raises:
        ValueError: the encoder is of another class.
    """

    def __init__(self, encoder: AdapterModel) -> None:
        require_blip(encoder, "BlipForConditionalGeneration", "hf/blip-caption")
        self.encoder = encoder
        self.backbone = cast(Any, encoder.backbone)
        self.tokens = BlipTokens.of(encoder.backbone)

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Returns image tokens (B, N, D) of pixels (B, 3, H, W)."""
        return image_tokens_of(self.encoder, pixels)

    def losses(
        self,
        image_tokens: Tensor,
        captions: Tensor,
        *,
        prompt: int,
        label_smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Sums the negative log-likelihoods of each caption's tokens, and counts the tokens.

        The end token counts; prompt and padding do not. For one caption, sum / count is the loss of
        BlipForConditionalGeneration for these labels.

        Args:
            image_tokens: (M, N, D) of the image of each caption.
            captions: (M, T): [DEC] prompt caption [SEP], padded.
            prompt: P.
            label_smoothing: that of torch's cross-entropy; 0.1 in BLIP's training.

        Returns:
            the sums (M,) float32 and the counts (M,) int64.
        """
        logits = self.backbone.text_decoder(
            input_ids=captions,
            attention_mask=token_mask(captions, self.tokens),
            encoder_hidden_states=image_tokens,
            use_cache=False,
            return_dict=True,
        ).logits.float()
        labels = captions.masked_fill(captions == self.tokens.pad, IGNORED)[:, prompt:]
        losses = F.cross_entropy(
            logits[:, prompt - 1 : -1].transpose(1, 2),
            labels,
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return losses.sum(dim=1), (labels != IGNORED).sum(dim=1)

    @torch.no_grad()
    def generate(
        self,
        image_tokens: Tensor,
        prompt: Tensor,
        *,
        beams: int = 1,
        max_tokens: int = 20,
        min_tokens: int = 0,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        no_repeat_ngram: int = 0,
        use_cache: bool = True,
    ) -> Tensor:
        """Writes padded captions (B, T) without their prompt, greedily or by beam search.

        BlipForConditionalGeneration.generate gives the same; it removes the last token of a prompt,
        which is the [SEP] of its tokenizer.

        Args:
            image_tokens: (B, N, D). prompt: (P,) int64, [DEC] and the tokens that every caption
            begins with. beams: number of beams; 1 is greedy. max_tokens, min_tokens: most and least
            tokens after the prompt, with [SEP]. length_penalty: above 1, beam search prefers longer
            captions. repetition_penalty: above 1, tokens of the prompt and the caption so far are
            less likely. no_repeat_ngram: length of sequences that must not repeat; 0 for no limit.
            use_cache: whether keys and values of earlier tokens are reused.
        """
        start = prompt.to(image_tokens.device).expand(len(image_tokens), -1)
        only_beams = {"length_penalty": length_penalty} if beams > 1 else {}
        written = self.backbone.text_decoder.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=image_tokens,
            encoder_attention_mask=start.new_ones(image_tokens.shape[:2]),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=max_tokens,
            min_new_tokens=min_tokens,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram,
            eos_token_id=self.tokens.end,
            pad_token_id=self.tokens.pad,
            use_cache=use_cache,
            **only_beams,
        )
        return written[:, len(prompt) :]

"""BLIP of transformers that writes captions: likelihoods of texts, and generation.

The decoder is called with an image's tokens directly, so that an image is read once for all of its
captions and for what is generated. All images have equally many tokens: their mask, which
transformers ignores in the cross-attention (see `blip`), has nothing to hide here.

Shape legend: B images, M captions, N image tokens, T caption tokens, P tokens of the prompt with
[DEC], D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmadapters import AdapterModel

from .blip import IGNORED, BlipTokens, image_tokens_of, require_blip, token_mask


class BlipCaptioner:
    """Captions by a BlipForConditionalGeneration. Holds no parameters.

    Raises:
        ValueError: the encoder is another model.
    """

    def __init__(self, encoder: AdapterModel) -> None:
        require_blip(encoder, "BlipForConditionalGeneration", "hf/blip-caption")
        self.encoder = encoder
        self.backbone = cast(Any, encoder.backbone)
        self.tokens = BlipTokens.of(encoder.backbone)

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D)."""
        return image_tokens_of(self.encoder, pixels)

    def losses(
        self,
        image_tokens: Tensor,
        captions: Tensor,
        *,
        prompt: int,
        label_smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """The negative log-likelihood of each caption's tokens, summed, and how many they are.

        The end token counts, the prompt and padding do not. Of one caption the quotient is the loss
        that BlipForConditionalGeneration gives for these labels.

        Args:
            image_tokens: (M, N, D) of the image of each caption.
            captions: (M, T): [DEC] prompt caption [SEP], padded.
            prompt: P.
            label_smoothing: of torch's cross-entropy; 0.1 in BLIP's training.

        Returns:
            (M,) float32 and (M,) int64.
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
        """Captions (B, T) without their prompt, padded; greedily, or by beam search.

        As BlipForConditionalGeneration.generate, which takes off the last token of a prompt, where
        its tokenizer has put [SEP].

        Args:
            image_tokens: (B, N, D).
            prompt: (P,) int64, [DEC] and the tokens that every caption begins with.
            max_tokens, min_tokens: the most and the least tokens behind the prompt, [SEP] included.
            length_penalty: above 1 a beam search prefers longer captions.
            repetition_penalty: above 1 tokens that were written are less likely; the prompt's too.
            no_repeat_ngram: so many tokens never follow each other twice; 0 for no limit.
        """
        begun = prompt.to(image_tokens.device).expand(len(image_tokens), -1)
        only_beams = {"length_penalty": length_penalty} if beams > 1 else {}
        found = self.backbone.text_decoder.generate(
            input_ids=begun,
            attention_mask=torch.ones_like(begun),
            encoder_hidden_states=image_tokens,
            encoder_attention_mask=begun.new_ones(image_tokens.shape[:2]),
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
        return found[:, len(prompt) :]

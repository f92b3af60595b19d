"""BLIP of transformers: matching images with texts, and answering questions about images.

This module does not use the forward functions of transformers. They pass the decoder's
cross-attention a mask that it ignores (in 4.57 and 5.x), and `generate` passes a mask of ones over
the question, so that the padding of a question changes its answer. `mend_cross_attention` makes the
mask effective, and the calls below pass the mask of the padding. Adapters are active, since each
module is called as a whole.

Shape legend: B images or questions, N image tokens, L question tokens, M answers, T answer tokens,
D width, E width of the shared space, V vocabulary of the tokenizer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmadapters import AdapterModel

from .blip_text import BlipTokens, token_mask

IGNORED = -100  # label of tokens that do not count in the loss
LOGITS_AT_A_TIME = 2**26  # most values of (M, T, V) in memory at once when answers are ranked


def mend_cross_attention(backbone: nn.Module) -> None:
    """Makes the mask of BLIP's cross-attentions effective; without a mask nothing changes.

    transformers passes the mask as that of the text, which a cross-attention does not read. The
    hooks have no state, so they also work when checkpointed blocks run again. They stay on the
    encoder; further calls add no more hooks.
    """
    for name, module in backbone.named_modules():
        mended = _give_mask in module._forward_pre_hooks.values()
        if name.endswith(".crossattention.self") and not mended:
            module.register_forward_pre_hook(_give_mask, with_kwargs=True)


def _give_mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if kwargs.get("encoder_attention_mask") is None:
        kwargs["encoder_attention_mask"] = kwargs.get("attention_mask")
    return args, kwargs


class BlipMatcher:
    """Matches images and texts with a BlipForImageTextRetrieval; has no parameters of its own.

    Attributes:
        width: E.
        logit_scale: logarithm of the inverse temperature at the start of BLIP's contrastive
            training (0.07); the model of transformers has none.

    Raises:
        ValueError: the encoder is of another class.
    """

    def __init__(self, encoder: AdapterModel) -> None:
        require_blip(encoder, "BlipForImageTextRetrieval", "hf/blip-retrieval")
        mend_cross_attention(encoder.backbone)
        self.encoder = encoder
        self.backbone = cast(Any, encoder.backbone)
        self.tokens = BlipTokens.of(encoder.backbone)
        self.width: int = self.backbone.vision_proj.out_features
        self.logit_scale = torch.tensor(-math.log(0.07))

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Returns image tokens (B, N, D), class token first, of pixels (B, 3, H, W)."""
        return image_tokens_of(self.encoder, pixels)

    def images(self, pixels: Tensor) -> Tensor:
        """Returns contrastive features (B, E), not of unit length, of pixels (B, 3, H, W)."""
        return self.images_of(self.image_tokens(pixels))

    def images_of(self, image_tokens: Tensor) -> Tensor:
        """Returns contrastive features (B, E), not of unit length, of image tokens (B, N, D)."""
        return self.backbone.vision_proj(image_tokens[:, 0])

    def texts(self, tokens: Tensor) -> Tensor:
        """Returns contrastive features (B, E), not of unit length.

        Args:
            tokens: (B, L) from `BlipTokenizer.__call__`.
        """
        states = self.backbone.text_encoder(
            input_ids=tokens, attention_mask=token_mask(tokens, self.tokens), return_dict=True
        ).last_hidden_state
        return self.backbone.text_proj(states[:, 0])

    def match(
        self, image_tokens: Tensor, tokens: Tensor, *, itm_head: nn.Module | None = None
    ) -> Tensor:
        """Returns logits (B, 2) of "does not match" and "matches" for each pair.

        Args:
            image_tokens: (B, N, D) from `image_tokens`.
            tokens: (B, L) from `BlipTokenizer.with_image`.
            itm_head: replaces the encoder's last layer.
        """
        states = self.backbone.text_encoder(
            input_ids=tokens,
            attention_mask=token_mask(tokens, self.tokens),
            encoder_hidden_states=image_tokens,
            return_dict=True,
        ).last_hidden_state
        return (itm_head or self.backbone.itm_head)(states[:, 0])


class BlipAnswerer:
    """Answers questions with a BlipForQuestionAnswering; has no parameters of its own.

    The argument `lm_head` of its methods replaces the decoder's last layers. A copy of these may be
    trained while the encoder does not change.

    Raises:
        ValueError: the encoder is of another class.
    """

    def __init__(self, encoder: AdapterModel) -> None:
        require_blip(encoder, "BlipForQuestionAnswering", "hf/blip-vqa")
        mend_cross_attention(encoder.backbone)
        self.encoder = encoder
        self.backbone = cast(Any, encoder.backbone)
        self.tokens = BlipTokens.of(encoder.backbone)

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Returns image tokens (B, N, D) of pixels (B, 3, H, W)."""
        return image_tokens_of(self.encoder, pixels)

    def question_states(self, image_tokens: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes questions with their images: returns states (B, L, D) and their mask (B, L).

        Args:
            image_tokens: (B, N, D).
            tokens: (B, L) from `BlipTokenizer.with_image`.
        """
        mask = token_mask(tokens, self.tokens)
        states = self.backbone.text_encoder(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=image_tokens,
            return_dict=True,
        ).last_hidden_state
        return states, mask

    def logits(
        self, states: Tensor, mask: Tensor, answers: Tensor, *, lm_head: nn.Module | None = None
    ) -> Tensor:
        """Returns the logits (M, T, V) float32 of the token after each token of an answer.

        Args:
            states, mask: (M, L, D) and (M, L) of the question of each answer.
            answers: (M, T) from `BlipTokenizer.answers`.
            lm_head: replaces the decoder's last layers.
        """
        decoder = self.backbone.text_decoder
        hidden = decoder.bert(
            input_ids=answers,
            attention_mask=token_mask(answers, self.tokens),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            is_decoder=True,
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        return (lm_head or decoder.cls)(hidden).float()

    def losses(
        self,
        states: Tensor,
        mask: Tensor,
        answers: Tensor,
        *,
        lm_head: nn.Module | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Returns the negative log-likelihood (M,) of each answer with its end token.

        Args:
            states, mask: (M, L, D) and (M, L) of the question of each answer.
            answers: (M, T) from `BlipTokenizer.answers`.
            lm_head: replaces the decoder's last layers.
            label_smoothing: that of torch's cross-entropy; 0.1 in BLIP's training.
        """
        logits = self.logits(states, mask, answers, lm_head=lm_head)
        labels = answers.masked_fill(answers == self.tokens.pad, IGNORED)[:, 1:]
        losses = F.cross_entropy(
            logits[:, :-1].transpose(1, 2),
            labels,
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return losses.sum(dim=1)

    def rank(
        self,
        states: Tensor,
        mask: Tensor,
        candidates: Tensor,
        *,
        count: int,
        lm_head: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Ranks the candidates with the most likely first tokens by the likelihood of all tokens.

        BLIP answers in this way (Li et al. 2022, §5.3). If `count` is at least M, the order is
        exactly that of the likelihoods of all candidates.

        Args:
            states, mask: (B, L, D) and (B, L) of the questions.
            candidates: (M, T) from `BlipTokenizer.answers`.
            count: K, the number of candidates that are scored in full.
            lm_head: replaces the decoder's last layers.

        Returns:
            log-likelihoods (B, K) in descending order, and the indices (B, K) of the candidates.
        """
        count = min(count, len(candidates))
        first = self.logits(
            states, mask, candidates[:1, :1].expand(len(states), -1), lm_head=lm_head
        )
        first = first[:, 0].log_softmax(dim=-1)[:, candidates[:, 1]]
        chosen = first.topk(count, dim=1).indices  # (B, K)
        question = torch.arange(len(states), device=states.device).repeat_interleave(count)
        answers = candidates[chosen.flatten()]  # (B·K, T)
        step = max(1, LOGITS_AT_A_TIME // (candidates.shape[1] * self.tokens.vocabulary))
        likelihoods = torch.cat(
            [
                -self.losses(states[rows], mask[rows], part, lm_head=lm_head)
                for rows, part in zip(question.split(step), answers.split(step), strict=True)
            ]
        ).view(len(states), count)
        likelihoods, order = likelihoods.sort(dim=1, descending=True, stable=True)
        return likelihoods, chosen.gather(1, order)

    @torch.no_grad()
    def generate(
        self,
        states: Tensor,
        mask: Tensor,
        *,
        beams: int = 1,
        max_tokens: int = 10,
        lm_head: nn.Module | None = None,
    ) -> Tensor:
        """Writes answers (B, T) as padded ids, [DEC] first, greedily or by beam search.

        Args:
            states, mask: (B, L, D) and (B, L) of the questions.
            beams: number of beams; 1 is greedy.
            max_tokens: most tokens after [DEC].
            lm_head: replaces the decoder's last layers.
        """
        decoder = self.backbone.text_decoder
        start = torch.full((len(states), 1), self.tokens.start, device=states.device)
        with _in_place_of(decoder.cls, lm_head):
            return decoder.generate(
                input_ids=start,
                attention_mask=torch.ones_like(start),
                encoder_hidden_states=states,
                encoder_attention_mask=mask,
                num_beams=beams,
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=self.tokens.end,
                pad_token_id=self.tokens.pad,
            )


def is_blip(backbone: nn.Module) -> bool:
    """Tells whether the encoder is a BLIP model of transformers."""
    return any(
        kind.__module__.startswith("transformers.models.blip.") for kind in type(backbone).__mro__
    )


@contextlib.contextmanager
def _in_place_of(module: nn.Module, other: nn.Module | None) -> Iterator[None]:
    """Replaces the output of `module` by that of `other` inside the block."""
    if other is None:
        yield
        return
    handle = module.register_forward_hook(lambda _, args, output: other(*args))
    try:
        yield
    finally:
        handle.remove()


def require_blip(encoder: AdapterModel, kind: str, name: str) -> None:
    """Raises a ValueError unless the encoder is BLIP's class `kind`, which loads as `name`."""
    actual = type(encoder.backbone)
    if not is_blip(encoder.backbone) or actual.__name__ != kind:
        raise ValueError(f"this needs a {kind} ({name}), not a {actual.__name__}")


def image_tokens_of(encoder: AdapterModel, pixels: Tensor) -> Tensor:
    """Returns image tokens (B, N, D), class token first, of pixels (B, 3, H, W)."""
    backbone = cast(Any, encoder.backbone)
    return backbone.vision_model(pixel_values=pixels, return_dict=True).last_hidden_state

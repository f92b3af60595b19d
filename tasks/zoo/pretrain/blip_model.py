"""The network of `nano/blip` in training, and its loss.

Shape legend: B pairs of a picture and a text, T image tokens, D width, L text tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapters.zoo import blip, load_nano

from .. import photos
from .training import IMAGE

SMOOTHING = 0.1  # label smoothing of language modelling


LEARNT_BLOCKS = 2  # number of trained blocks of the vision tower, from its top


class Blip(nn.Module):
    """The network in training: `nano/vit` with frozen lower blocks, text encoder, heads, decoder.

    Attributes:
        lower: number of frozen vision blocks.
    """

    def __init__(self, architecture: dict[str, Any]) -> None:
        super().__init__()
        from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

        config = blip.config_of(architecture)
        vit = load_nano("nano/vit", library="timm")
        assert isinstance(vit, VisionTransformer)
        self.lower = len(vit.blocks) - LEARNT_BLOCKS
        self.vit = vit.requires_grad_(False)
        for part in (*vit.blocks[self.lower :], vit.norm):
            part.requires_grad_(True)
        # On a CPU, PyTorch's fused attention in bf16 makes a step slower by a fifth.
        module: Any
        for module in vit.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        retrieval = BlipForImageTextRetrieval(config)
        self.text_encoder = retrieval.text_encoder
        self.vision_proj, self.text_proj = retrieval.vision_proj, retrieval.text_proj
        self.itm_head = retrieval.itm_head
        self.text_decoder = BlipForConditionalGeneration(config).text_decoder
        shared = dict(self.text_encoder.named_parameters())
        for name, _ in list(self.text_decoder.bert.named_parameters()):
            if blip.is_shared(name):
                path, _, leaf = name.rpartition(".")
                setattr(self.text_decoder.bert.get_submodule(path), leaf, shared[name])
        output = self.text_decoder.cls.predictions
        output.decoder.weight = shared["embeddings.word_embeddings.weight"]
        output.decoder.bias = output.bias
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))

    def frozen_states(self, images: Tensor) -> Tensor:
        """Returns the states (B, T, D) that enter the first trained block.

        Args:
            images: (B, 3, 64, 64) uint8.
        """
        x = self.vit._pos_embed(self.vit.patch_embed(photos.normalise(images, IMAGE)))
        return self.vit.blocks[: self.lower](x)

    def image_tokens(self, states: Tensor) -> Tensor:
        """Returns image tokens (B, T, D) of `frozen_states` (B, T, D)."""
        return self.vit.norm(self.vit.blocks[self.lower :](states))

    def encode(self, tokens: Tensor, images: Tensor | None = None) -> Tensor:
        """Returns the first token's state (B, D) of texts (B, L).

        Args:
            images: image tokens (B, T, D) for cross-attention; None reads the text alone.
        """
        states = self.text_encoder(
            input_ids=tokens,
            attention_mask=(tokens != 0).long(),
            encoder_hidden_states=images,
            return_dict=True,
        ).last_hidden_state
        return states[:, 0]

    def logits(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Returns the decoder's logits (B, L, V) of the token after each of `tokens` (B, L)."""
        hidden = self.text_decoder.bert(
            input_ids=tokens,
            attention_mask=(tokens != 0).long(),
            encoder_hidden_states=images,
            is_decoder=True,
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        return self.text_decoder.cls(hidden)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the weights that the file holds; see `mmadapters.zoo.blip`."""
        upper = tuple(f"blocks.{n}." for n in range(self.lower, len(self.vit.blocks)))
        vit = self.vit.state_dict()
        tensors = blip.vision_tensors(
            {k: v for k, v in vit.items() if k.startswith((*upper, "norm."))}
        )
        states = self.state_dict()
        tensors |= {k: v for k, v in states.items() if k.startswith(blip.MATCHING)}
        bert, output = "text_decoder.bert.", "text_decoder.cls.predictions."
        tensors |= {k: v for k, v in states.items() if k.startswith(bert) and not blip.is_shared(k)}
        tensors |= {
            k: v
            for k, v in states.items()
            if k.startswith(output) and not k.startswith(f"{output}decoder.")
        }
        return tensors


def loss_of(model: Blip, states: Tensor, tokens: Tensor) -> Tensor:
    """Returns contrast + matching + language modelling of B pairs.

    Args:
        states: (B, T, D) from `Blip.frozen_states`.
        tokens: (B, L) with start and end token, padded with zeros.
    """
    images = model.image_tokens(states)
    image = F.normalize(model.vision_proj(images[:, 0]).float(), dim=-1)
    text = F.normalize(model.text_proj(model.encode(tokens)).float(), dim=-1)
    logits = model.logit_scale.exp().clamp(max=100) * image @ text.T  # (B, B)
    pair = torch.arange(len(tokens), device=tokens.device)
    contrast = (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2

    decode, encode = model.text_encoder.config.vocab_size - 2, tokens.clone()
    encode[:, 0] = decode + 1
    with torch.no_grad():
        hard = logits.softmax(dim=1) + 1e-6
        text_of = torch.multinomial(hard.fill_diagonal_(0), 1)[:, 0]
        hard = logits.T.softmax(dim=1) + 1e-6
        image_of = torch.multinomial(hard.fill_diagonal_(0), 1)[:, 0]
    pairs = model.encode(
        torch.cat([encode, encode[text_of], encode]),
        torch.cat([images, images, images[image_of]]),
    )
    labels = (torch.arange(len(pairs), device=pairs.device) < len(pair)).long()
    matching = F.cross_entropy(model.itm_head(pairs).float(), labels)

    begun = tokens.clone()
    begun[:, 0] = decode
    expected = model.logits(begun[:, :-1], images).float()
    words = F.cross_entropy(
        expected.transpose(1, 2),
        tokens[:, 1:],
        ignore_index=0,
        label_smoothing=SMOOTHING,
    )
    return contrast + matching + words

"""Small image-text models of transformers and open_clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from open_clip import model as open_clip
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from . import Family, blip, seeded
from .vision import EVERYTHING, images, pixel_values

VOCABULARY = 64
LENGTH = 8
END = VOCABULARY - 1
# Text towers have masks of the text's length, so no prompts: those are for the image tower.
TRAITS = EVERYTHING

# open_clip's own activation, as it must be for a model and its twin to agree.
VISION = {
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_act": "gelu",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": END,
    "pad_token_id": 0,
}


def tokens() -> Tensor:
    """(2, 8): each text ends with the end token."""
    ids = torch.randint(3, END - 1, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    ids[:, -1] = END
    return ids


def input_ids() -> tuple[tuple, dict[str, Any]]:
    return (), {"input_ids": tokens()}


def both() -> tuple[tuple, dict[str, Any]]:
    return (), {"input_ids": tokens(), "pixel_values": images()}


def image_and_text() -> tuple[tuple, dict[str, Any]]:
    return (images(), tokens()), {}


def large_image_and_text() -> tuple[tuple, dict[str, Any]]:
    image = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(7))
    return (image, tokens()), {}


def _hf(
    name: str,
    kind: str,
    model: str,
    inputs: Callable[[], tuple[tuple, dict[str, Any]]] = both,
    traits: frozenset[str] = TRAITS,
) -> Family:
    def make() -> nn.Module:
        vision = getattr(transformers, f"{kind}VisionConfig")(**VISION, projection_dim=32)
        text = getattr(transformers, f"{kind}TextConfig")(**TEXT, projection_dim=32)
        if inputs is pixel_values:
            config = vision
        elif inputs is input_ids:
            config = text
        else:
            config = getattr(transformers, f"{kind}Config")(
                text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32
            )
        return getattr(transformers, model)(config)

    return Family(name, lambda: seeded(make), inputs, traits)


def _open_clip(
    name: str,
    kind: str = "CLIP",
    inputs: Callable[[], tuple[tuple, dict[str, Any]]] = image_and_text,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    hf_text: bool = False,
    traits: frozenset[str] = TRAITS | {"raw"},
) -> Family:
    def make() -> nn.Module:
        images = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
        words = {
            "context_length": LENGTH,
            "vocab_size": VOCABULARY,
            "width": 32,
            "heads": 2,
            "layers": 2,
        }
        images, words = {**images, **(vision or {})}, {**words, **(text or {})}
        if kind == "CoCa":
            decoder = {
                "context_length": LENGTH,
                "vocab_size": VOCABULARY,
                "width": 32,
                "heads": 2,
                "layers": 2,
            }
            coca = CoCa(32, decoder, words, images)
            # open_clip leaves this one as the memory it lies in.
            nn.init.normal_(coca.text_decoder.text_projection, std=32**-0.5)
            return coca
        built = getattr(open_clip, kind)(
            32, open_clip.CLIPVisionCfg(**images), open_clip.CLIPTextCfg(**words)
        )
        if hf_text:
            built.text = _bert_tower()
        return built

    return Family(name, lambda: seeded(make), inputs, traits)


def _bert_tower() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return HFTextEncoder("", 32, config=config, pooler_type="mean_pooler", proj_type="linear")


QK_NORM = {"block_type": "custom", "qk_norm": True, "scale_attn": True, "scale_fc": True}

CLIP_FAMILIES: list[Family] = [
    _hf("hf-clip", "CLIP", "CLIPModel", traits=TRAITS | {"twin:open_clip-clip"}),
    _hf("hf-clip-vision", "CLIP", "CLIPVisionModel", pixel_values),
    _hf("hf-clip-vision-projected", "CLIP", "CLIPVisionModelWithProjection", pixel_values),
    _hf("hf-clip-text", "CLIP", "CLIPTextModel", input_ids, TRAITS - {"prompt"}),
    _hf(
        "hf-clip-text-projected",
        "CLIP",
        "CLIPTextModelWithProjection",
        input_ids,
        TRAITS - {"prompt"},
    ),
    _hf("hf-siglip", "Siglip", "SiglipModel"),
    _hf("hf-siglip-vision", "Siglip", "SiglipVisionModel", pixel_values),
    _hf("hf-siglip-text", "Siglip", "SiglipTextModel", input_ids, TRAITS - {"prompt"}),
    _open_clip("open_clip-clip", traits=TRAITS | {"raw", "twin:hf-clip"}),
    _open_clip("open_clip-custom_text", "CustomTextCLIP", vision={"ls_init_value": 0.5}),
    _open_clip("open_clip-own_attention", "CustomTextCLIP", vision=QK_NORM, text=QK_NORM),
    _open_clip(
        "open_clip-timm_tower",
        "CustomTextCLIP",
        large_image_and_text,
        vision={
            "timm_model_name": "test_vit",
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 160,
        },
    ),
    _open_clip("open_clip-bert", "CustomTextCLIP", hf_text=True),
    _open_clip(
        "open_clip-coca",
        "CoCa",
        vision={"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        text={"embed_cls": True, "output_tokens": True},
    ),
]
FAMILIES = [*CLIP_FAMILIES, *blip.FAMILIES]

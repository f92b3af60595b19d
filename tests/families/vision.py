"""Small vision transformers of timm and transformers, one for each form of their blocks."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from timm.layers import SwiGLUPacked
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from . import Family, seeded

SIZE = 32
WIDTH = 32
TIMM = {"img_size": SIZE, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
HF = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": SIZE,
    "patch_size": 8,
}
EVERYTHING = frozenset({"prefix", "prompt"})
NO_PROMPT = EVERYTHING - {"prompt"}


def images() -> Tensor:
    """(2, 3, 32, 32), always the same."""
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))


def positional() -> tuple[tuple, dict[str, Any]]:
    return (images(),), {}


def pixel_values() -> tuple[tuple, dict[str, Any]]:
    return (), {"pixel_values": images()}


def _timm(
    name: str,
    traits: frozenset[str] = EVERYTHING,
    of: type[nn.Module] = VisionTransformer,
    **kwargs: Any,
) -> Family:
    return Family(
        name, lambda: seeded(lambda: of(**{**TIMM, "num_classes": 5, **kwargs})), positional, traits
    )


def _hf(
    name: str,
    config: str,
    model: str,
    traits: frozenset[str] = EVERYTHING,
    **kwargs: Any,
) -> Family:
    def make() -> nn.Module:
        settings = getattr(transformers, config)(**{**HF, **kwargs})
        return getattr(transformers, model)(settings)

    return Family(name, lambda: seeded(make), pixel_values, traits)


SWIGLU: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
EVA: dict[str, Any] = {"of": Eva, "use_rot_pos_emb": True}
BEIT: dict[str, Any] = {"layer_scale_init_value": 0.5, "num_labels": 5}

FAMILIES: list[Family] = [
    _timm("timm-vit", EVERYTHING | {"twin:hf-vit"}, num_classes=0, global_pool=""),
    _timm("timm-vit-classifier"),
    _timm("timm-vit-avg", class_token=False, global_pool="avg", qkv_bias=False),
    _timm("timm-vit-qknorm", qk_norm=True, init_values=0.5, drop_path_rate=0.1),
    _timm("timm-vit-post", block_fn=ResPostBlock),
    _timm("timm-deit", of=VisionTransformerDistilled),
    _timm("timm-dinov2-reg", reg_tokens=4, init_values=0.5, num_classes=0, no_embed_class=True),
    _timm("timm-dinov2-swiglu", **SWIGLU, init_values=0.5),
    _timm("timm-clip", pre_norm=True),
    _timm("timm-siglip", class_token=False, global_pool="map"),
    _timm("timm-relpos", NO_PROMPT, of=VisionTransformerRelPos),
    _timm("timm-eva", EVERYTHING | {"raw"}, of=Eva, init_values=0.5),
    _timm("timm-eva02", NO_PROMPT, **EVA, swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    _timm("timm-eva02-packed", NO_PROMPT | {"raw"}, **EVA, swiglu_mlp=True),
    _timm(
        "timm-dinov3",
        NO_PROMPT,
        **EVA,
        rope_type="dinov3",
        qkv_bias=False,
        init_values=0.5,
        num_reg_tokens=2,
        use_abs_pos_emb=False,
    ),
    _timm("timm-eva-rope", NO_PROMPT, **EVA, attn_type="rope"),
    _timm(
        "timm-beit",
        NO_PROMPT | {"raw"},
        of=Beit,
        qkv_bias=True,
        init_values=0.5,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
    ),
    # timm's epsilon, as it must be for a model and its twin to agree.
    _hf("hf-vit", "ViTConfig", "ViTModel", EVERYTHING | {"twin:timm-vit"}, layer_norm_eps=1e-6),
    _hf("hf-vit-classifier", "ViTConfig", "ViTForImageClassification", num_labels=5),
    _hf("hf-deit", "DeiTConfig", "DeiTModel"),
    _hf("hf-dinov2", "Dinov2Config", "Dinov2Model", mlp_ratio=2, layerscale_value=0.5),
    _hf(
        "hf-dinov2-swiglu",
        "Dinov2Config",
        "Dinov2ForImageClassification",
        mlp_ratio=2,
        use_swiglu_ffn=True,
        drop_path_rate=0.1,
        layerscale_value=0.5,
    ),
    _hf(
        "hf-dinov2-reg",
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        mlp_ratio=2,
        num_register_tokens=2,
    ),
    _hf("hf-beit", "BeitConfig", "BeitModel", **BEIT, use_absolute_position_embeddings=True),
    _hf(
        "hf-beit-relative",
        "BeitConfig",
        "BeitForImageClassification",
        NO_PROMPT,
        **BEIT,
        use_relative_position_bias=True,
    ),
    _hf("hf-dinov3", "DINOv3ViTConfig", "DINOv3ViTModel", NO_PROMPT, num_register_tokens=2),
]

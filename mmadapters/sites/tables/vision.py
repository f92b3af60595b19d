"""Vision transformers of timm and transformers: tower `vision`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..paths import first_at, patches_at
from ..spec import Architecture, LeafSpec, SublayerSpec, TableRow, TowerSpec
from .huggingface import if_sdpa

ROTARY = "its rotary positions are laid over every token behind the class and register tokens"
RELATIVE = "its relative position bias has room for its own tokens only"

# Blocks whose norm comes after the sublayer, on the branch: x + norm(f(x)).
POST_NORM = {"ResPostBlock", "EvaBlockPostNorm", "ResPostRelPosBlock"}
PARALLEL = {"ParallelScalingBlock", "DiffParallelScalingBlock", "ParallelThingsBlock"}
# Attentions with one `scaled_dot_product_attention` over heads of width/heads.
PLAIN_ATTENTION = {"Attention", "AttentionRope", "EvaAttention", "RelPosAttention"}


def random_image(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """Returns a random image (1, C, H, W) in the dtype and on the device of the first convolution.

    For a model with batch norm, which cannot train on one image, it returns two.
    """
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = getattr(model, "in_chans", 3) if convolution is None else convolution.in_channels
    weight = next(model.parameters()) if convolution is None else convolution.weight
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return torch.randn(2 if normed else 1, channels, *size).to(weight.device, weight.dtype)


def square(size: Any) -> tuple[int, int]:
    """Returns a side, or a pair of sides, as a pair (H, W)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def timm_example(model: nn.Module) -> tuple[tuple, dict]:
    """Returns an image of the size for which the model was built.

    If the model takes any size, the image has 2 x 2 patches.
    """
    embed: Any = model.patch_embed
    size = embed.img_size
    if size is None or getattr(model, "dynamic_img_size", False):
        size = [2 * side for side in square(embed.patch_size)]
    return (random_image(model, square(size)),), {}


def timm_tower(model: Any, prompts: str | None, scaled: bool = True) -> TowerSpec:
    """Returns the tower of a timm vision transformer.

    Args:
        prompts: the reason why no tokens can be appended, as the end of a sentence; None if they
            can be.
        scaled: takes a branch after its LayerScale, not before it.

    Raises:
        ValueError: attention and feed-forward part of its blocks are not two sublayers.
    """
    block = next(iter(model.blocks))
    kind = type(block).__name__
    if kind in PARALLEL:
        raise ValueError(
            f"the blocks of this {type(model).__name__} are {kind}s, which compute attention and "
            "feed-forward part side by side: they have no sublayers for adapters to act on"
        )
    post = any(cls.__name__ in POST_NORM for cls in type(block).__mro__)
    attn = SublayerSpec(
        output="drop_path1" if scaled else "attn",
        residual="attn" if post else "norm1",
        input="attn",
        attention="attn" if _takes_prefix(block.attn) else None,
        owner="attn",
        norm="norm1",
        leaves=_timm_attention(block.attn),
    )
    ffn = SublayerSpec(
        output="drop_path2" if scaled else "mlp",
        residual="mlp" if post else "norm2",
        input="mlp",
        norm="norm2",
        leaves=_timm_mlp(block.mlp),
    )
    return TowerSpec(
        name="vision",
        blocks="blocks",
        sublayers={"attn": attn, "ffn": ffn},
        norm=first_at(model, "norm", "fc_norm"),
        prompts=prompts,
        patches=patches_at(model, model.num_prefix_tokens, "patch_embed.proj"),
    )


def _takes_prefix(attn: Any) -> bool:
    """Says whether prefix tuning can enter the attention."""
    into, out = attn.proj.in_features, attn.proj.out_features
    plain = any(cls.__name__ in PLAIN_ATTENTION for cls in type(attn).__mro__)
    return plain and bool(attn.fused_attn) and into == out


def _timm_attention(attn: nn.Module) -> Mapping[str, str | LeafSpec]:
    if attn.qkv is None:
        return {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "o": "attn.proj"}
    if getattr(attn, "q_bias", None) is not None and not attn.qkv_bias_separate:
        # EVA and BEiT have no bias for k, and pass the weight itself to F.linear.
        return {
            "q": LeafSpec(path="attn.qkv.weight[0/3]", bias="attn.q_bias"),
            "k": LeafSpec(path="attn.qkv.weight[1/3]", bias=None),
            "v": LeafSpec(path="attn.qkv.weight[2/3]", bias="attn.v_bias"),
            "o": "attn.proj",
        }
    return {"q": "attn.qkv[0/3]", "k": "attn.qkv[1/3]", "v": "attn.qkv[2/3]", "o": "attn.proj"}


def _timm_mlp(mlp: nn.Module) -> Mapping[str, str]:
    if hasattr(mlp, "fc1_g"):
        return {"up": "mlp.fc1_x", "gate": "mlp.fc1_g", "down": "mlp.fc2"}
    if hasattr(mlp, "gate_last"):
        up, gate = (0, 1) if mlp.gate_last else (1, 0)
        return {"up": f"mlp.fc1[{up}/2]", "gate": f"mlp.fc1[{gate}/2]", "down": "mlp.fc2"}
    return {"up": "mlp.fc1", "down": "mlp.fc2"}


def _timm_vit(model: nn.Module) -> Iterable[Architecture]:
    yield _timm(timm_tower(model, None))


def _timm_eva(model: nn.Module) -> Iterable[Architecture]:
    yield _timm(timm_tower(model, None if model.rope is None else ROTARY))


def _timm_relative(model: nn.Module) -> Iterable[Architecture]:
    yield _timm(timm_tower(model, RELATIVE))


def _timm_beit(model: nn.Module) -> Iterable[Architecture]:
    biased = model.rel_pos_bias is not None or any(
        block.attn.relative_position_bias_table is not None for block in model.blocks
    )
    # transformers' BEiT has no module after its LayerScale. The branch is taken before it in both
    # libraries, so that one adapter file fits both.
    yield _timm(timm_tower(model, RELATIVE if biased else None, scaled=False))


def _timm(tower: TowerSpec) -> Architecture:
    return Architecture(towers=(tower,), example=timm_example, library="timm")


def _attentions(model: nn.Module, norm: str, output: str) -> Iterator[SublayerSpec]:
    """Yields the attention of transformers 5 and of transformers 4.

    Version 5 has query, key and value next to the output map, version 4 one level below it.
    """
    for inner, names in (
        ("attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("attention.attention", ("query", "key", "value", None)),
    ):
        leaves = {
            role: f"{inner}.{leaf}" if leaf else "attention.output.dense"
            for role, leaf in zip("qkvo", names, strict=True)
        }
        yield SublayerSpec(
            output=output,
            residual=norm,
            input="attention",
            attention=if_sdpa(model, inner),
            norm=norm,
            leaves=leaves,
        )


def _mlps(norm: str, output: str | None) -> Iterator[SublayerSpec]:
    """Yields the spellings of the feed-forward part in transformers 5 and 4, exact ones first."""
    for leaves in (
        {"up": "mlp.up_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"},
        {"up": "mlp.up_proj", "down": "mlp.down_proj"},
        {"up": "mlp.weights_in[1/2]", "gate": "mlp.weights_in[0/2]", "down": "mlp.weights_out"},
        {"up": "mlp.fc1", "down": "mlp.fc2"},
    ):
        yield SublayerSpec(
            output=output or "mlp", residual=norm, input="mlp", norm=norm, leaves=leaves
        )
    # transformers 4 adds the residual inside `output`; its dropout is the last step before that.
    yield SublayerSpec(
        output=output or "output.dropout",
        residual=norm,
        input="intermediate",
        norm=norm,
        leaves={"up": "intermediate.dense", "down": "output.dense"},
    )


def _transformers(
    model: nn.Module,
    norms: tuple[str, str],
    outputs: tuple[str, str | None] = ("attention", None),
    *,
    prompts: str | None = None,
    any_size: bool = False,
    num_prefix_tokens: int = 1,
) -> Iterable[Architecture]:
    """Yields candidates for a vision model of transformers, with or without a head.

    Args:
        norms: the paths of the norms of attention and feed-forward part.
        outputs: the paths of their outputs; None for the default of each spelling.
        prompts: the reason why no tokens can be appended; None if they can be.
        any_size: the model interpolates position embeddings, so that the example may be small.
        num_prefix_tokens: the number of class and register tokens before the patches.
    """
    # DINOv3's base model is named "model", as is the encoder inside it: look in both places.
    prefixes = (f"{model.base_model_prefix}.", "")
    blocks = ("layers", "encoder.layer", "encoder.layers", "layer", "model.layer")
    norms_after = ("layernorm", "norm", "pooler.layernorm")
    path = first_at(model, *(prefix + block for prefix in prefixes for block in blocks))
    final = first_at(model, *(prefix + norm for prefix in prefixes for norm in norms_after))
    embeddings = ("embeddings.patch_embeddings.projection", "embeddings.patch_embeddings")
    patches = patches_at(
        model, num_prefix_tokens, *(prefix + name for prefix in prefixes for name in embeddings)
    )
    if path is None:
        raise ValueError(f"{type(model).__name__} has no blocks at {', '.join(blocks)}")

    def example(model: nn.Module) -> tuple[tuple, dict]:
        config: Any = model.config
        size = square(config.image_size)
        if any_size:
            patch = square(config.patch_size)
            size = (min(size[0], 4 * patch[0]), min(size[1], 4 * patch[1]))
        return (), {"pixel_values": random_image(model, size)}

    attentions = _attentions(model, norms[0], outputs[0])
    for attn, ffn in itertools.product(attentions, tuple(_mlps(norms[1], outputs[1]))):
        tower = TowerSpec(
            name="vision",
            blocks=path,
            sublayers={"attn": attn, "ffn": ffn},
            norm=final,
            prompts=prompts,
            patches=patches,
        )
        yield Architecture(towers=(tower,), example=example, library="transformers")


def _vit(model: nn.Module) -> Iterable[Architecture]:
    return _transformers(model, ("layernorm_before", "layernorm_after"))


def _deit(model: nn.Module) -> Iterable[Architecture]:
    # A token for distillation follows the class token.
    return _transformers(model, ("layernorm_before", "layernorm_after"), num_prefix_tokens=2)


def _beit(model: nn.Module) -> Iterable[Architecture]:
    config: Any = model.config
    biased = config.use_relative_position_bias or config.use_shared_relative_position_bias
    return _transformers(
        model, ("layernorm_before", "layernorm_after"), prompts=RELATIVE if biased else None
    )


def _dino(prompts: str | None) -> Callable[[nn.Module], Iterable[Architecture]]:
    def architectures(model: nn.Module) -> Iterable[Architecture]:
        # `drop_path` is one module for both sublayers, so the branch is taken just before it.
        return _transformers(
            model,
            ("norm1", "norm2"),
            ("layer_scale1", "layer_scale2"),
            prompts=prompts,
            any_size=True,
            num_prefix_tokens=1 + getattr(model.config, "num_register_tokens", 0),
        )

    return architectures


ROWS: tuple[TableRow, ...] = (
    TableRow(
        classes=("timm.models.vision_transformer.VisionTransformer",), architectures=_timm_vit
    ),
    TableRow(classes=("timm.models.eva.Eva",), architectures=_timm_eva),
    TableRow(classes=("timm.models.beit.Beit",), architectures=_timm_beit),
    TableRow(
        classes=("timm.models.vision_transformer_relpos.VisionTransformerRelPos",),
        architectures=_timm_relative,
    ),
    TableRow(classes=("transformers.models.vit.modeling_vit.ViT*",), architectures=_vit),
    TableRow(classes=("transformers.models.deit.modeling_deit.DeiT*",), architectures=_deit),
    TableRow(classes=("transformers.models.beit.modeling_beit.Beit*",), architectures=_beit),
    TableRow(
        classes=(
            "transformers.models.dinov2.modeling_dinov2.Dinov2*",
            "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2*",
        ),
        architectures=_dino(None),
    ),
    TableRow(
        classes=("transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViT*",),
        architectures=_dino(ROTARY),
    ),
)

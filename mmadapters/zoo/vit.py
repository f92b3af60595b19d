"""`nano/vit`: timm's `VisionTransformer`, and HF's `ViTModel` with the same weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import read_config, read_weights

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor, nn
    from transformers import ViTModel


def load(directory: Path, library: str, **kwargs: Any) -> "nn.Module":
    """Loads the encoder of a directory as the class of `library` ("timm" or "hf")."""
    architecture = read_config(directory)["architecture"]
    if library == "hf":
        return _to_hf(read_weights(directory), architecture, **kwargs)
    return load_weights(directory, architecture | kwargs)


def load_weights(directory: Path, architecture: dict[str, Any]) -> "VisionTransformer":
    """Builds timm's network with the weights of a directory; a head (`num_classes`) stays random.

    Raises:
        RuntimeError: the weights do not fit the architecture.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    # Initialising 4.9M weights at random takes longer than everything else in loading.
    model = build(weight_init="skip", **architecture)
    weights = read_weights(directory)
    weights = checkpoint_filter_fn(weights, model)  # resamples positions for another img_size
    result = model.load_state_dict(weights, strict=False)
    missing = [name for name in result.missing_keys if not name.startswith("head.")]
    if missing or result.unexpected_keys:
        raise RuntimeError(f"{directory}: missing {missing}, unknown {result.unexpected_keys}")
    return model.eval()


def build(**architecture: Any) -> "VisionTransformer":
    """Builds timm's network with random weights.

    As in HF's `ViTModel`, the final norm is before pooling (`final_norm`, no `fc_norm`) and there
    is a class token. Training used the mean of the patch tokens.
    """
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**architecture)


def _to_hf(weights: "dict[str, Tensor]", architecture: dict[str, Any], **kwargs: Any) -> "ViTModel":
    from transformers import ViTConfig, ViTModel

    from .huggingface import from_tensors

    width = architecture["embed_dim"]
    config = ViTConfig(
        **{
            "hidden_size": width,
            "num_hidden_layers": architecture["depth"],
            "num_attention_heads": architecture["num_heads"],
            "intermediate_size": 4 * width,
            "image_size": architecture["img_size"],
            "patch_size": architecture["patch_size"],
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
        }
        | kwargs
    )
    tensors = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.position_embeddings": weights["pos_embed"],
    }
    _copy(weights, tensors, "patch_embed.proj", "embeddings.patch_embeddings.projection")
    _copy(weights, tensors, "norm", "layernorm")
    for index in range(architecture["depth"]):
        ours, theirs = f"blocks.{index}", f"encoder.layer.{index}"
        for ours_part, theirs_part in _HF_PARTS.items():
            _copy(weights, tensors, f"{ours}.{ours_part}", f"{theirs}.{theirs_part}")
        for kind in ("weight", "bias"):
            parts = weights[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                tensors[f"{theirs}.attention.attention.{name}.{kind}"] = part
    return from_tensors(ViTModel, config, tensors=tensors, add_pooling_layer=False)


_HF_PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _copy(weights: "dict[str, Tensor]", into: "dict[str, Tensor]", ours: str, theirs: str) -> None:
    for kind in ("weight", "bias"):
        into[f"{theirs}.{kind}"] = weights[f"{ours}.{kind}"]

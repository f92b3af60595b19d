"""`nano/blip-retrieval` and `nano/blip-caption`: one BLIP as two classes of transformers.

One file holds the weights of both: the vision blocks that differ from those of `nano/vit`, the
text encoder, and those weights of the decoder that the text encoder does not have. The tokenizer is
that of `nano/clip`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import clip
from .files import read_config, read_weights

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import BlipConfig, PreTrainedTokenizerFast

VIT, CLIP = (Path(__file__).parent / "weights" / name for name in ("vit", "clip"))
CLASSES = {
    "retrieval": "BlipForImageTextRetrieval",
    "caption": "BlipForConditionalGeneration",
}
# Names of the weights that matching needs in addition to the vision tower.
MATCHING = ("text_encoder.", "vision_proj.", "text_proj.", "itm_head.")


def load(directory: Path, library: str, *, kind: str, **kwargs: Any) -> nn.Module:
    """Loads the encoder of a directory as the class of `kind` ("retrieval" or "caption").

    Args:
        library: "hf", the only one.
        kwargs: fields of `BlipConfig`.
    """
    return build(read_config(directory)["architecture"], read_weights(directory), kind, **kwargs)


def load_tokenizer(directory: Path, library: str) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of `nano/clip`; the ids of [DEC] and [ENC] follow its last id."""
    return clip.load_tokenizer(CLIP, library)  # type: ignore[return-value]


def build(
    architecture: dict[str, Any], weights: dict[str, Tensor], kind: str, **kwargs: Any
) -> nn.Module:
    """Builds the class of `kind` from a config's architecture and the weights of a file."""
    import transformers

    from .huggingface import from_tensors

    tensors = vision_tensors(read_weights(VIT))
    tensors |= {key: value for key, value in weights.items() if key in tensors}
    if kind == "retrieval":
        tensors |= {key: value for key, value in weights.items() if key.startswith(MATCHING)}
    else:
        tensors |= decoder_tensors(weights)
    cls = getattr(transformers, CLASSES[kind])
    return from_tensors(cls, config_of(architecture, **kwargs), tensors=tensors)


def config_of(architecture: dict[str, Any], **kwargs: Any) -> BlipConfig:
    """Returns BLIP's config; [DEC] and [ENC] are the last two ids, [SEP] is the end token."""
    from transformers import BlipConfig

    vocabulary = architecture["text_config"]["vocab_size"]
    special = {"bos_token_id": vocabulary - 2, "sep_token_id": vocabulary - 3, "pad_token_id": 0}
    special["eos_token_id"] = special["sep_token_id"]
    return BlipConfig(
        vision_config=architecture["vision_config"],
        text_config=architecture["text_config"] | special,
        projection_dim=architecture["embed_dim"],
        image_text_hidden_size=architecture["embed_dim"],
        **kwargs,
    )


def vision_tensors(vit: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of timm's ViT for BLIP's vision tower, which computes the same."""
    names = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm": "post_layernorm",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.qkv": "self_attn.qkv",
        "attn.proj": "self_attn.projection",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    tensors = {}
    for key, value in vit.items():
        part, dot, leaf = (key, "", "") if key in names else key.rpartition(".")
        block = ""
        if part.startswith("blocks."):
            _, number, part = part.split(".", 2)
            block = f"encoder.layers.{number}."
        tensors[f"vision_model.{block}{names[part]}{dot}{leaf}"] = value
    return tensors


def decoder_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns all tensors of the decoder; all but self-attention and output are the encoder's."""
    decoder = "text_decoder."
    tensors = {
        f"{decoder}bert.{key.removeprefix('text_encoder.')}": value
        for key, value in weights.items()
        if key.startswith("text_encoder.")
    }
    tensors |= {key: value for key, value in weights.items() if key.startswith(decoder)}
    head = f"{decoder}cls.predictions."
    tensors[f"{head}decoder.weight"] = weights["text_encoder.embeddings.word_embeddings.weight"]
    tensors[f"{head}decoder.bias"] = weights[f"{head}bias"]
    return tensors


def is_shared(name: str) -> bool:
    """Tells whether decoder and text encoder share a parameter: all but self-attention."""
    return ".attention." not in name

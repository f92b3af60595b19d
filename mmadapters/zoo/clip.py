"""`nano/clip`: `open_clip.CLIP`, HF's `CLIPModel` with the same weights, and the tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_text
from .files import read_config, read_weights

if TYPE_CHECKING:
    from open_clip import CLIP
    from torch import Tensor, nn
    from transformers import CLIPModel, PreTrainedTokenizerFast

TOKENIZER = "tokenizer.json"
PAD, START, END = "<pad>", "<start>", "<end>"


def load(directory: Path, library: str, **kwargs: Any) -> "nn.Module":
    """Loads the encoder of a directory as the class of `library` ("open_clip" or "hf")."""
    architecture = read_config(directory)["architecture"]
    weights = read_weights(directory)
    if library == "hf":
        return _to_hf(weights, architecture, **kwargs)
    model = build(**architecture | kwargs)
    model.load_state_dict(weights)
    return model.eval()


def build(**architecture: Any) -> "CLIP":
    """Builds open_clip's network with random weights.

    GELU and LayerNorm's epsilon are those of HF. The end token has the highest id, so open_clip's
    pooling (argmax) and HF's (first end token) read the same position.
    """
    import open_clip

    return open_clip.CLIP(quick_gelu=False, **architecture)


def load_tokenizer(directory: Path, library: str) -> Callable[..., Any]:
    """Loads HF's `PreTrainedTokenizerFast` ("hf") or open_clip's `HFTokenizer` from one file."""
    if library == "hf":
        return _hf_tokenizer(directory)
    from open_clip.tokenizer import HFTokenizer

    length = read_config(directory)["tokenizer"]["context_length"]
    return HFTokenizer(str(directory), context_length=length)


def write_tokenizer_config(directory: Path, *, context_length: int) -> None:
    """Writes `tokenizer_config.json`, which `AutoTokenizer` needs; open_clip loads through it."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "pad_token": PAD,
        "bos_token": START,
        "eos_token": END,
    }
    write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _hf_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(directory / TOKENIZER),
        model_max_length=read_config(directory)["tokenizer"]["context_length"],
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
    )


def _to_hf(
    weights: "dict[str, Tensor]", architecture: dict[str, Any], **kwargs: Any
) -> "CLIPModel":
    from transformers import CLIPConfig, CLIPModel

    from .huggingface import from_tensors

    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    common = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
    width = vision["width"]
    config = CLIPConfig(
        vision_config=common
        | {
            "hidden_size": width,
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": width // vision["head_width"],
            "intermediate_size": 4 * width,
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        text_config=common
        | {
            "hidden_size": text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "intermediate_size": 4 * text["width"],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "pad_token_id": 0,
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
        },
        projection_dim=architecture["embed_dim"],
        **kwargs,
    )
    tensors = {
        "logit_scale": weights["logit_scale"],
        "text_model.embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": weights["positional_embedding"],
        "text_projection.weight": weights["text_projection"].T.contiguous(),
        "vision_model.embeddings.class_embedding": weights["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": weights["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": weights["visual.positional_embedding"],
        "visual_projection.weight": weights["visual.proj"].T.contiguous(),
    }
    for ours, theirs in _HF_NORMS.items():
        _copy(weights, tensors, ours, theirs)
    _tower_to_hf(weights, tensors, "visual.transformer", "vision_model", vision["layers"])
    _tower_to_hf(weights, tensors, "transformer", "text_model", text["layers"])
    return from_tensors(CLIPModel, config, tensors=tensors)


_HF_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # HF's spelling
    "visual.ln_post": "vision_model.post_layernorm",
}
_HF_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _tower_to_hf(
    weights: "dict[str, Tensor]", into: "dict[str, Tensor]", tower: str, model: str, layers: int
) -> None:
    for index in range(layers):
        ours, theirs = f"{tower}.resblocks.{index}", f"{model}.encoder.layers.{index}"
        for ours_part, theirs_part in _HF_PARTS.items():
            _copy(weights, into, f"{ours}.{ours_part}", f"{theirs}.{theirs_part}")
        for kind in ("weight", "bias"):
            parts = weights[f"{ours}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                into[f"{theirs}.self_attn.{name}.{kind}"] = part


def _copy(weights: "dict[str, Tensor]", into: "dict[str, Tensor]", ours: str, theirs: str) -> None:
    for kind in ("weight", "bias"):
        into[f"{theirs}.{kind}"] = weights[f"{ours}.{kind}"]

"""BLIP of transformers: towers `vision`, `text` with its `fusion` cross-attentions, `decoder`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from ..spec import Architecture, EmbeddingSpec, PatchSpec, SublayerSpec, TableRow, TowerSpec
from .huggingface import path_of, place, token_ids
from .text import NO_PROMPTS, post_norm_layer

EITHER = (
    "it passes its projections without use_itm_head only, so that matching would not see the "
    "adapter; adapt its blocks"
)


def _vision() -> TowerSpec:
    # BLIP multiplies its attention matrices itself, here and in its text models.
    attn = SublayerSpec(
        output="self_attn",
        residual="layer_norm1",
        norm="layer_norm1",
        leaves={
            "q": "self_attn.qkv[0/3]",
            "k": "self_attn.qkv[1/3]",
            "v": "self_attn.qkv[2/3]",
            "o": "self_attn.projection",
        },
    )
    ffn = SublayerSpec(
        output="mlp",
        residual="layer_norm2",
        norm="layer_norm2",
        leaves={"up": "mlp.fc1", "down": "mlp.fc2"},
    )
    return TowerSpec(
        name="vision",
        blocks="vision_model.encoder.layers",
        sublayers={"attn": attn, "ffn": ffn},
        norm="vision_model.post_layernorm",
        patches=PatchSpec(path="vision_model.embeddings.patch_embedding"),
    )


def _text(name: str, path: str, *, crossed: bool, names: dict[str, str] | None = None) -> TowerSpec:
    return TowerSpec(
        name=name,
        blocks=f"{path}.encoder.layer",
        sublayers=post_norm_layer(attention=None, crossed=crossed),
        names=names or {},
        prompts=NO_PROMPTS,
    )


def blip_example(model: Any) -> tuple[tuple, dict]:
    """Returns a random image (1, 3, H, W) and four random tokens, and for VQA answers too."""
    size = model.config.vision_config.image_size
    vocabulary = model.config.text_config.vocab_size
    inputs = {
        "pixel_values": torch.randn(1, 3, size, size, **place(model)),
        "input_ids": token_ids(model, vocabulary, 1, 4),
    }
    if path_of(model, "BlipForQuestionAnswering") == "":
        inputs["decoder_input_ids"] = token_ids(model, vocabulary, 1, 3)
        inputs["labels"] = inputs["decoder_input_ids"]
    return (), inputs


def _blip(model: Any) -> Iterable[Architecture]:
    towers = [_vision()]
    if hasattr(model, "text_model"):
        # BlipModel compares a text with an image, without cross-attention between them.
        towers.append(_text("text", "text_model", crossed=False))
    if hasattr(model, "text_encoder"):
        crossed = model.config.text_config.is_decoder
        towers.append(_text("text", "text_encoder", crossed=crossed, names={"cross": "fusion"}))
    if hasattr(model, "text_decoder"):
        towers.append(_text("decoder", "text_decoder.bert", crossed=True))
    if hasattr(model, "visual_projection"):
        paths = {"vision": "visual_projection", "text": "text_projection"}
        width = model.visual_projection.out_features
        towers = [
            dataclasses.replace(tower, embedding=EmbeddingSpec(path=paths[tower.name], width=width))
            for tower in towers
        ]
    elif hasattr(model, "vision_proj"):
        towers = [dataclasses.replace(tower, embedding=EITHER) for tower in towers]
    yield Architecture(towers=tuple(towers), example=blip_example, library="transformers")


ROWS: tuple[TableRow, ...] = (
    TableRow(
        classes=tuple(
            f"transformers.models.blip.modeling_blip.Blip{kind}"
            for kind in (
                "Model",
                "ForImageTextRetrieval",
                "ForQuestionAnswering",
                "ForConditionalGeneration",
            )
        ),
        architectures=_blip,
    ),
)

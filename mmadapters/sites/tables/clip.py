"""Image-text encoders of transformers and open_clip: towers `vision` and `text`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..paths import at, first_at, nested, patches_at
from ..spec import (
    Architecture,
    EmbeddingSpec,
    Example,
    PatchSpec,
    SublayerSpec,
    TableRow,
    TowerSpec,
    Unresolved,
)
from . import text, vision
from .huggingface import below, if_sdpa
from .vision import random_image, square

TEXT = "the masks of its text tower have the length of the text"
POOLED = "its text is pooled at the place that the ids of the batch as it came tell"
MASKED = "its text is pooled under the mask of the batch as it came"
IN_TURNS = "two stacks of its decoder take turns"
BARE_PROJECTION = (
    "open_clip multiplies its text's embedding by a bare parameter, which no module gives; leave "
    "its text tower out, or build a CustomTextCLIP"
)
UNPROJECTED = (
    "it ends before the projection into the shared space; load the whole model or one "
    "WithProjection"
)
TIME_FIRST = "its blocks take tokens in the first dimension and the batch in the second"


def random_text(model: nn.Module, length: int, vocabulary: int, end: int | None) -> Tensor:
    """Returns random token ids (1, length) that end with `end`.

    The state of the end token is pooled. It comes last, because under a causal mask only the last
    token attends to all others.

    Args:
        end: the id of the end token; None if it is the highest id of the vocabulary.
    """
    device = next(model.parameters()).device
    ids = torch.randint(min(3, vocabulary - 2), vocabulary - 1, (1, length), device=device)
    if end is None:
        ids[:, -1] = vocabulary - 1
    else:
        ids[ids == end] += 1
        ids[:, -1] = end
    return ids


def _transformers(model: nn.Module) -> Iterable[Architecture]:
    """Yields CLIP or SigLIP of transformers, with both towers or with the one that there is.

    Raises:
        ValueError: the module is only a part of a tower.
    """
    towers = []
    for name, norm in (("vision", "post_layernorm"), ("text", "final_layer_norm")):
        # The final norm says which tower it is if the model has only one of them.
        prefixes = (f"{name}_model.{name}_model.", f"{name}_model.", "")
        path = first_at(model, *(prefix + norm for prefix in prefixes))
        if path is not None:
            towers.append(_transformers_tower(model, name, path))
    if not towers:
        raise ValueError(
            f"{type(model).__name__} is a part of a tower; "
            "adapters need a whole CLIP or SigLIP model"
        )
    example = _transformers_example(tuple(tower.name for tower in towers))
    yield Architecture(towers=tuple(towers), example=example, library="transformers")


def _transformers_tower(model: nn.Module, name: str, norm: str) -> TowerSpec:
    holder = norm.rpartition(".")[0]
    tower = at(model, holder)
    assert tower is not None
    attn = SublayerSpec(
        output="self_attn",
        residual="layer_norm1",
        attention=if_sdpa(tower, "self_attn"),
        norm="layer_norm1",
        leaves={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.out_proj",
        },
    )
    ffn = SublayerSpec(
        output="mlp",
        residual="layer_norm2",
        norm="layer_norm2",
        leaves={"up": "mlp.fc1", "down": "mlp.fc2"},
    )
    return TowerSpec(
        name=name,
        blocks=below(holder, "encoder.layers"),
        sublayers={"attn": attn, "ffn": ffn},
        norm=norm,
        prompts=TEXT if name == "text" else None,
        copies=POOLED if name == "text" and not hasattr(tower, "head") else None,
        # SigLIP has no class token.
        patches=patches_at(
            model,
            int(hasattr(at(tower, "embeddings"), "class_embedding")),
            below(holder, "embeddings.patch_embedding"),
        ),
        embedding=_transformers_embedding(model, name, holder),
    )


def _transformers_embedding(model: Any, name: str, holder: str) -> EmbeddingSpec | str:
    """Returns where the embedding of a tower comes out, or the reason why no module returns it.

    CLIP's projections stand next to its towers; SigLIP's heads are the towers' last modules.
    """
    projection = "visual_projection" if name == "vision" else "text_projection"
    for path in (projection, below(holder, "head")):
        module: Any = at(model, path)
        # A classifier on patches calls SigLIP's head and ignores its output.
        if module is not None and at(model, "classifier") is None:
            config = getattr(model.config, f"{name}_config", model.config)
            width = getattr(module, "out_features", config.hidden_size)
            return EmbeddingSpec(path=path, width=width)
    return UNPROJECTED


def _transformers_example(towers: tuple[str, ...]) -> Example:
    def example(model: nn.Module) -> tuple[tuple, dict]:
        """Returns an image and a text of at most 8 tokens, as far as there is a tower for each."""
        inputs: dict[str, Tensor] = {}
        if "text" in towers:
            config: Any = getattr(model.config, "text_config", model.config)
            length = min(8, config.max_position_embeddings)
            # Old CLIP configurations say 2 and mean the highest id.
            end = None if config.eos_token_id == 2 else config.eos_token_id
            if end is not None and end >= config.vocab_size:
                end = None
            inputs["input_ids"] = random_text(model, length, config.vocab_size, end)
        if "vision" in towers:
            config = getattr(model.config, "vision_config", model.config)
            inputs["pixel_values"] = random_image(model, square(config.image_size))
        return (), inputs

    return example


def _residual_block(blocks: nn.Module, kind: str = "attn") -> dict[str, SublayerSpec]:
    """Returns the sublayers of open_clip's blocks.

    Their attention is `nn.MultiheadAttention` or open_clip's own. Both read `in_proj_weight`
    themselves, and `nn.MultiheadAttention` also reads its output weight.

    Args:
        kind: the key of the attention, "attn" or "cross".
    """
    attn = at(blocks, "0.attn")
    mha = isinstance(attn, nn.MultiheadAttention)
    prefixable = mha or (
        getattr(attn, "use_fsdpa", False) and getattr(attn, "logit_scale", None) is None
    )
    attention = SublayerSpec(
        output="ls_1",
        residual="ln_1",
        input="attn",
        attention="attn" if prefixable else None,
        norm="ln_1",
        leaves={
            "q": "attn.in_proj_weight[0/3]",
            "k": "attn.in_proj_weight[1/3]",
            "v": "attn.in_proj_weight[2/3]",
            "o": "attn.out_proj.weight" if mha else "attn.out_proj",
        },
    )
    ffn = SublayerSpec(
        output="ls_2",
        residual="ln_2",
        input="mlp",
        norm="ln_2",
        leaves={"up": "mlp.c_fc", "down": "mlp.c_proj"},
    )
    return {kind: attention, "ffn": ffn}


def _batch_first(blocks: nn.Module) -> bool:
    """Says whether blocks of open_clip take (B, N, D), not (N, B, D)."""
    return getattr(at(blocks, "0.attn"), "batch_first", True)


def _open_clip_width(model: Any) -> int:
    """Returns the width of the space that both towers share."""
    holder = getattr(model, "text", model)
    projection = getattr(holder, "text_projection", None)
    if isinstance(projection, nn.Linear):
        return projection.out_features
    if isinstance(projection, Tensor):
        return projection.shape[1]
    if at(holder, "ln_final") is not None:
        return holder.ln_final.normalized_shape[0]
    return holder.output_dim


def _open_clip_text_embedding(model: nn.Module) -> EmbeddingSpec | str:
    """Returns where the text's embedding comes out, or the reason why no module returns it."""
    for path in ("text", "text_projection"):
        if at(model, path) is not None:
            return EmbeddingSpec(path=path, width=_open_clip_width(model))
    return BARE_PROJECTION


def _open_clip_vision(model: nn.Module) -> list[TowerSpec]:
    """Returns candidates for the image tower.

    Raises:
        ValueError: it is not a vision transformer.
    """
    embedding = EmbeddingSpec(path="visual", width=_open_clip_width(model))
    towers = [
        dataclasses.replace(tower, embedding=embedding)
        for tower in nested(model, "visual.trunk", vision.ROWS, "vision")
    ]
    blocks = at(model, "visual.transformer.resblocks")
    if blocks is not None:
        batch_first = _batch_first(blocks)
        towers.append(
            TowerSpec(
                name="vision",
                blocks="visual.transformer.resblocks",
                sublayers=_residual_block(blocks),
                # Behind an attentional pooler, this norm has the pooler's width.
                norm="visual.ln_post",
                prompts=None if batch_first else TIME_FIRST,
                batch_first=batch_first,
                patches=PatchSpec(path="visual.conv1"),
                embedding=embedding,
            )
        )
    if not towers:
        tower = at(model, "visual.trunk") or at(model, "visual")
        raise ValueError(
            f"the image tower of this {type(model).__name__} is a {type(tower).__name__}; "
            "adapters need a vision transformer there"
        )
    return towers


def _open_clip_text(model: nn.Module) -> list[TowerSpec]:
    """Returns candidates for the text tower, which is open_clip's own or a transformers model.

    Raises:
        ValueError: it is a transformers model that is not known.
    """
    for prefix in ("", "text."):
        blocks = at(model, f"{prefix}transformer.resblocks")
        if blocks is not None:
            tower = TowerSpec(
                name="text",
                blocks=f"{prefix}transformer.resblocks",
                sublayers=_residual_block(blocks),
                norm=f"{prefix}ln_final",
                prompts=TEXT,
                copies=POOLED,
                batch_first=_batch_first(blocks),
                embedding=_open_clip_text_embedding(model),
            )
            return [tower]
    towers = list(nested(model, "text.transformer", text.ROWS, "text"))
    if not towers:
        module = at(model, "text.transformer") or at(model, "text")
        raise ValueError(
            f"the text tower of this {type(model).__name__} is a {type(module).__name__}, which "
            "mmadapters does not know"
        )
    embedding = _open_clip_text_embedding(model)
    return [dataclasses.replace(tower, copies=MASKED, embedding=embedding) for tower in towers]


def open_clip_example(model: nn.Module) -> tuple[tuple, dict]:
    """Returns an image and a text as long as the context, or 8 tokens for a transformers model."""
    holder: Any = getattr(model, "text", model)
    visual: Any = model.visual
    native = at(holder, "transformer.resblocks") is not None
    end = None
    if getattr(holder, "pool_type", getattr(holder, "text_pool_type", None)) == "eos":
        end = getattr(holder, "eos_id", getattr(holder, "text_eos_id", None))
    length = holder.context_length if native else min(8, holder.context_length or 8)
    ids = random_text(model, length, holder.vocab_size, end)
    return (random_image(visual, square(visual.image_size)), ids), {}


def _open_clip(model: nn.Module) -> Iterator[Architecture]:
    for towers in itertools.product(_open_clip_vision(model), _open_clip_text(model)):
        yield Architecture(towers=towers, example=open_clip_example, library="open_clip")


def _coca(model: nn.Module) -> Iterator[Architecture]:
    """Yields CoCa, whose decoder alternates between blocks of `decoder` (self-attention) and of
    `fusion` (cross-attention)."""
    decoder = TowerSpec(
        name="decoder",
        blocks="text_decoder.resblocks",
        sublayers=_residual_block(_required(model, "text_decoder.resblocks")),
        norm="text_decoder.ln_final",
        prompts=TEXT,
        copies=IN_TURNS,
    )
    fusion = TowerSpec(
        name="fusion",
        blocks="text_decoder.cross_attn",
        sublayers=_residual_block(_required(model, "text_decoder.cross_attn"), "cross"),
        prompts=TEXT,
        copies=IN_TURNS,
    )
    for towers in itertools.product(_open_clip_vision(model), _open_clip_text(model)):
        yield Architecture(
            towers=(*towers, decoder, fusion), example=open_clip_example, library="open_clip"
        )


def _required(model: nn.Module, path: str) -> nn.Module:
    """Returns the module at `path`, or raises `Unresolved`."""
    module = at(model, path)
    if module is None:
        raise Unresolved(f"{type(model).__name__} has no module {path!r}")
    return module


ROWS: tuple[TableRow, ...] = (
    TableRow(
        classes=(
            "transformers.models.clip.modeling_clip.CLIP*",
            "transformers.models.siglip.modeling_siglip.Siglip*",
        ),
        architectures=_transformers,
    ),
    TableRow(
        classes=("open_clip.model.CLIP", "open_clip.model.CustomTextCLIP"),
        architectures=_open_clip,
    ),
    TableRow(classes=("open_clip.coca_model.CoCa",), architectures=_coca),
)

"""Makes the head of a config and chooses the blocks that it reads."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import BEHIND_NECK, HeadConfig
from .plain import LinearHead, Segmenter, SetrPup
from .pyramid import FPNHead, PanopticFPN, SimplePyramid, UPerHead
from .vit_adapter import STAGES, NeckedHead, ViTAdapter

FOUR_BLOCKS = (*BEHIND_NECK, "fpn")  # the heads that read four blocks


def make_head(
    config: HeadConfig, *, width: int, patch: int, layers: int, classes: int
) -> nn.Module:
    """Makes a head with initial weights.

    Args:
        width: number of channels of the encoder's maps.
        patch: side of a patch in pixels.
        layers: number of maps that the head will get.
        classes: number of classes.

    Raises:
        ValueError: the head takes another number of maps, or the neck does not fit the width.
    """
    wanted = layers if config.kind == "linear" else 4 if config.kind in FOUR_BLOCKS else 1
    if layers != wanted:
        raise ValueError(f"the {config.kind} head reads {wanted} blocks, head.layers has {layers}")
    inner: dict[str, Any] = {
        "classes": classes,
        "channels": config.channels,
        "dropout": config.dropout,
    }
    if config.kind == "linear":
        return LinearHead(width * layers, classes=classes, dropout=config.dropout)
    if config.kind == "setr_pup":
        return SetrPup(width, patch=patch, **inner)
    if config.kind == "segmenter":
        return Segmenter(width, depth=config.depth, **inner)
    if config.kind == "fpn":
        return FPNHead(width, **inner)
    on_pyramid = UPerHead if config.kind == "upernet" else PanopticFPN
    if config.neck is None:
        return on_pyramid(width, pyramid=SimplePyramid(width), **inner)
    neck = ViTAdapter(width, config.vit_adapter)
    return NeckedHead(neck, on_pyramid(width, pyramid=nn.Identity(), **inner))


def head_layers(config: HeadConfig, depth: int) -> tuple[int, ...]:
    """Returns the blocks that a head reads in an encoder of `depth` blocks.

    Raises:
        ValueError: the encoder has no such block, or the blocks do not end the stages of a neck.
    """
    layers = _head_layers(config, depth)
    if config.neck is not None and (len(layers) != STAGES or sorted(set(layers)) != list(layers)):
        if config.layers is None:
            raise ValueError(
                f"head.neck: {config.neck} works in {STAGES} stages, of a block or more each; the "
                f"encoder has {depth}: take the neck out"
            )
        raise ValueError(
            f"head.layers: the neck reads the last block of each of {STAGES} stages, so give "
            f"{STAGES} blocks that rise, not {list(config.layers)}"
        )
    return layers


def _head_layers(config: HeadConfig, depth: int) -> tuple[int, ...]:
    if config.layers is not None:
        for layer in config.layers:
            if not -depth <= layer < depth:
                raise ValueError(
                    f"head.layers: there is no block {layer}, the encoder has {depth} (0 to "
                    f"{depth - 1}, or -{depth} to -1)"
                )
        return tuple(layer % depth for layer in config.layers)
    if config.kind in FOUR_BLOCKS:
        return tuple(max((part + 1) * depth // 4 - 1, 0) for part in range(4))
    return (depth - 1,)

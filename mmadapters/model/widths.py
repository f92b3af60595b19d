"""Keeps the config of a transformers model true when merging widens its feed-forward parts.

`save_pretrained` writes the config beside the weights, and `from_pretrained` builds the model from
it. If no config describes the weights, as layers differ, saving is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..sites.sitemap import SiteMap
from .refusal import RefusedMethod

# The names that transformers gives to the width of feed-forward parts.
KEYS = ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "n_inner")
_SEVERAL = (
    "the merged encoder cannot be saved by save_pretrained: its layers have feed-forward parts of "
    "several widths, and its config has one; call reset_adapter first, or merge an adapter that "
    "acts on all layers"
)


def follow_widths(backbone: nn.Module, sites: SiteMap) -> None:
    """Sets the widths in a model's config to those of its weights, or lets saving be refused.

    Models of other libraries have no such config and stay as they are.
    """
    config = getattr(backbone, "config", None)
    if config is None or not hasattr(type(backbone), "save_pretrained"):
        return
    backbone.__dict__.pop("save_pretrained", None)
    wrong = _mismatches(backbone, config)
    if not wrong:
        return
    before = [(part, key, getattr(part, key)) for part, key in _places(config)]
    ups = [leaf.weight for leaf in sites.leaves() if leaf.role == "up"]
    widths = sorted({weight.shape[0] for weight in ups if weight is not None})
    for part, key, old in before:
        for width in widths:
            setattr(part, key, width)
            now = _mismatches(backbone, config)
            if now < wrong:
                wrong = now
                break
            setattr(part, key, old)
    if wrong:
        for part, key, old in before:
            setattr(part, key, old)
        backbone.__dict__["save_pretrained"] = RefusedMethod(_SEVERAL)


def _places(config: Any) -> Iterator[tuple[Any, str]]:
    """Yields (config, key) for each width in a config and in the configs within it."""
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))]
    for part in parts:
        for key in KEYS:
            if isinstance(vars(part).get(key), int):
                yield part, key


def _mismatches(backbone: nn.Module, config: Any) -> int:
    """Returns how many tensors have another shape than in a model that is built from the config."""
    with torch.device("meta"):
        twin = type(backbone)(copy.deepcopy(config))
    shapes = {name: tensor.shape for name, tensor in twin.state_dict().items()}
    there = backbone.state_dict()
    return sum(shapes[name] != tensor.shape for name, tensor in there.items() if name in shapes)

"""The preprocessing of recordings for a speech encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import mmadapters

from ..config.schema import BackboneConfig


def longest(how: Mapping[str, Any], seconds: float | None) -> int | None:
    """Returns the samples to which longer recordings are cut, or None without a limit.

    Args:
        how: the preprocessing.
        seconds: `data.max_seconds` of the config.
    """
    bounds = [how["longest"]] if how["longest"] is not None else []
    if seconds is not None:
        bounds.append(round(seconds * how["rate"]))
    return min(bounds, default=None)


def audio_preprocessing(config: BackboneConfig, backbone: nn.Module) -> dict[str, Any]:
    """Returns the form in which the encoder reads recordings, JSON-ready.

    Returns:
        "rate": samples per second; "least": the fewest samples, which make one frame; "longest":
        the most samples, None without a bound; "layers": (kernel, stride) of the layers that make
        frames of samples; "normalise": whether to bring recordings to zero mean and unit variance.

    Raises:
        ValueError: the encoder has no audio tower.
    """
    from ..encoders.speech import SpeechTower, normalises

    model = mmadapters.init(backbone)
    try:
        tower = SpeechTower(model)
    finally:
        model.detach()
    low, high = 0, tower.sample_rate
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if tower.frames(middle) > 0 else (middle, high)
    return {
        "rate": tower.sample_rate,
        "least": high,
        "longest": tower.longest,
        "layers": tower.layers,
        "normalise": normalises(config, backbone),
    }

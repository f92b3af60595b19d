"""What a speech encoder wants of recordings, and how long they are."""

from __future__ import annotations

from typing import Any

from torch import nn

import mmadapters

from ..config.schema import BackboneConfig


def audio_preprocessing(config: BackboneConfig, backbone: nn.Module) -> dict[str, Any]:
    """What recordings must be for the encoder, JSON-ready.

    rate: samples per second; least: samples that make one frame; longest: samples that it takes,
    None without a bound; layers: (kernel, stride) of what makes frames of samples; normalise: to
    zero mean and unit variance.

    Raises:
        ValueError: it hears nothing.
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

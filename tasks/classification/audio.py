"""What a speech encoder wants of recordings, and how long they are."""

from __future__ import annotations

import io
from typing import Any

from torch import nn

import mmadapters

from ..config import BackboneConfig


def audio_preprocessing(config: BackboneConfig, backbone: nn.Module) -> dict[str, Any]:
    """What recordings must be for the encoder, JSON-ready.

    rate: samples per second; least: samples that make one frame; longest: samples that it takes,
    None without a bound; normalise: to zero mean and unit variance.

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
        "normalise": normalises(config, backbone),
    }


def audio_length(value: Any, rate: int) -> int:
    """About how many samples a recording has at `rate`, by its header; 0 if that cannot be read."""
    import soundfile

    if isinstance(value, dict) and value.get("array") is not None:
        return round(len(value["array"]) * rate / value["sampling_rate"])
    if isinstance(value, dict):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")
    try:
        found = soundfile.info(value)
    # soundfile's own error, and TypeError for what is no path.
    except (RuntimeError, OSError, TypeError):
        return 0
    return round(found.frames * rate / found.samplerate)

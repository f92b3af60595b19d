"""What a speech encoder wants of recordings, and how long they are."""

from __future__ import annotations

import io
from typing import Any

from torch import nn

import mmadapters


def audio_preprocessing(backbone: nn.Module) -> dict[str, int]:
    """rate: samples per second that the encoder hears; least: samples that make one frame.

    Raises:
        ValueError: it hears nothing.
    """
    from ..encoders.speech import SpeechTower

    model = mmadapters.init(backbone)
    try:
        tower = SpeechTower(model)
        low, high = 0, tower.sample_rate
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if tower.frames(middle) > 0 else (middle, high)
    finally:
        model.detach()
    return {"rate": int(tower.sample_rate), "least": high}


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

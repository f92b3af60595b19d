"""Random changes of training utterances. They are drawn from torch's global random state."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import AugmentConfig

_STEPS = 20  # speeds in twentieths: resampling is exact and fast for small ratios


def augmented(wave: Tensor, config: AugmentConfig, *, rate: int) -> Tensor:
    """Changes speed, noise and level of an utterance, (T,) -> (T',), as the config says."""
    low, high = config.speed
    if high > low or low != 1.0:
        factor = low + (high - low) * float(torch.rand(()))
        wave = faster(wave, round(factor * _STEPS), _STEPS)
    if config.noise and float(torch.rand(())) < config.noise:
        below = 10 ** (-float(torch.empty(()).uniform_(5, 40)) / 20)
        wave = wave + below * wave.square().mean().sqrt() * torch.randn_like(wave)
    if config.gain:
        wave = wave * 10 ** (float(torch.empty(()).uniform_(-config.gain, config.gain)) / 20)
    return wave


def faster(wave: Tensor, numerator: int, denominator: int) -> Tensor:
    """Returns the wave (T,) as it is when played `numerator / denominator` times as fast."""
    if numerator == denominator:
        return wave
    import torchaudio

    return torchaudio.functional.resample(wave, numerator, denominator)

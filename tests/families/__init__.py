"""Small real models of every backbone family, built from configs with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """`build` gives a fresh model in eval mode; `inputs` a batch of two as (args, kwargs).

    `traits`: what tests select by: "prefix" (can take prefix tuning), "prompt" (can take prompt
    tuning), "raw" (reads weights itself), "twin:<name>" (another family with the same weights).
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[tuple, dict[str, Any]]]
    traits: frozenset[str] = frozenset()


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The model of `make` with every parameter random: biases and norms too, which libraries
    initialise to values (0, 1) that would hide mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tensors(output: Any) -> list[Tensor]:
    """All floating tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (list, tuple)):
        return []
    return [tensor for part in output for tensor in tensors(part)]


def families() -> dict[str, Family]:
    from . import blip, language, speech, vision, vision_language

    every = [
        family
        for module in (vision, speech, vision_language, blip, language)
        for family in module.FAMILIES
    ]
    return {family.name: family for family in every}

"""Freezing an encoder, and undoing it."""

from __future__ import annotations

from torch import nn


class Freeze:
    """Freezes all parameters of an encoder and remembers which of them were trainable."""

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = backbone
        self._trainable = {n: p.requires_grad for n, p in backbone.named_parameters()}
        # In train mode transformers' speech encoders ask for gradients of their front end.
        self._front_ends = [m for m in backbone.modules() if m.__dict__.get("_requires_grad")]
        backbone.requires_grad_(False)
        for module in self._front_ends:
            module.__dict__["_requires_grad"] = False

    def undo(self) -> None:
        """Makes trainable what was trainable before. Parameters that are new are made trainable."""
        for name, parameter in self._backbone.named_parameters():
            parameter.requires_grad_(self._trainable.get(name, True))
        for module in self._front_ends:
            module.__dict__["_requires_grad"] = True

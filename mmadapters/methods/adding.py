"""A branch that says what it adds, whatever it reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Branch


class Adding(Branch):
    """Adds `change` to the branch; subclasses name there what they read beside the usual."""

    def forward(
        self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None, **more: Any
    ) -> Tensor:
        return branch + self.change(branch, residual=residual, input=input, **more)

    def change(
        self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None, **more: Any
    ) -> Tensor:
        """What `forward` adds to the branch, (B, N, D)."""
        raise TypeError(f"{type(self).__name__} does not say what it adds")

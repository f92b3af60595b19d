"""Hooks that keep what branches read besides the output of their own sublayer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites.sitemap import Grid
from .calls import first_input
from .state import Hook

# Inputs of a branch that come from other sublayers of its block: the residual stream that enters
# cross-attention, and the input of self-attention.
OF_BLOCK = ("query", "attended")


@dataclass(eq=False)
class CaptureHook(Hook):
    """Keeps the first input of a module until the branch at `key` (site, name) reads it."""

    before = with_kwargs = True

    key: tuple[str, str]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.state.plan().branch.get(self.key[0]):
            self.state.local.stash[self.key] = first_input(args, kwargs)


@dataclass(eq=False)
class ForgetHook(Hook):
    """Drops, when a block begins, what an earlier call that broke off has kept for `key`."""

    before = True

    key: tuple[str, str]

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.state.local.stash.pop(self.key, None)


@dataclass(eq=False)
class MaskHook(Hook):
    """Keeps which tokens are no padding until the branch at `site` reads it."""

    before = with_kwargs = True

    site: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.state.plan().branch.get(self.site):
            stash, key = self.state.local.stash, (self.site, "mask")
            stash.pop(key, None)
            shown, hidden = kwargs.get("attention_mask"), kwargs.get("key_padding_mask")
            if shown is not None:
                stash[key] = _shown(shown)
            elif hidden is not None:  # of nn.MultiheadAttention
                stash[key] = ~hidden if hidden.dtype == torch.bool else hidden > -1


def _shown(mask: Tensor) -> Tensor:
    """Returns (B, N), True for the tokens that an attention mask shows.

    Args:
        mask: (B, N), not 0 for shown tokens; or (B, 1, N, N), the same for every query: True or 0
            for shown tokens, far below 0 for hidden ones.
    """
    if mask.dim() == 2:
        return mask != 0
    mask = mask[:, 0, 0]
    return mask if mask.dtype == torch.bool else mask > -1


@dataclass(eq=False)
class GridHook(Hook):
    """Keeps how an image's patches lie until the branches at `sublayers` read it."""

    num_prefix_tokens: int
    sublayers: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        grid = Grid(self.num_prefix_tokens, output.shape[-2], output.shape[-1])
        branch, stash = self.state.plan().branch, self.state.local.stash
        for name in self.sublayers:
            if name in branch:
                stash[name, "grid"] = grid

"""Heads of a classifier that compares an image's embedding with those of class names and pictures.

Shape legend: B images, E width of the shared space, C classes, K keys of a cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALPHA, BETA = 1.0, 5.5  # Tip-Adapter's weights before any are searched for (its section 4.4)


def unit(features: Tensor) -> Tensor:
    """(B, E) -> (B, E) of unit length, in float32 or wider."""
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.normalize(features, dim=-1)


class ZeroShotHead(nn.Module):
    """s f Wᵀ of unit vectors f and W (C, E), CLIP's zero-shot classifier (Radford et al. 2021,
    section 3.1). Has no parameters.

    `current`: whether W is that of the text tower as it is now.

    Args:
        scale: s, the encoder's inverse temperature.
    """

    def __init__(self, width: int, classes: int, *, scale: Tensor) -> None:
        super().__init__()
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", torch.zeros(classes, width))
        self.register_buffer("scale", scale.detach().float().reshape(()).clone())
        self.current = False
        self.register_load_state_dict_post_hook(_loaded)

    def forward(self, features: Tensor, weight: Tensor | None = None) -> Tensor:
        """(B, E) of the encoder -> (B, C) logits in float32. `weight`: instead of the kept W."""
        return self.zero_shot(unit(features), self.weight if weight is None else weight)

    def zero_shot(self, f: Tensor, weight: Tensor) -> Tensor:
        """(B, E) of unit length -> (B, C)."""
        with torch.autocast(f.device.type, enabled=False):
            return self.scale * f @ weight.T


def _loaded(head: nn.Module, keys: object) -> None:
    assert isinstance(head, ZeroShotHead)
    head.current = True


class TipAdapterHead(ZeroShotHead):
    """s f Wᵀ + α exp(-β (1 - f Kᵀ)) V (Zhang et al. 2022, eqs. 4-6), V the one-hot classes of the
    keys K. α is 0, and so all is zero-shot, until the keys are there.

    Keys are of unit length; those that are trained (Tip-Adapter-F) begin so and may change it, as
    in the authors' code.

    Args:
        keys: K, how many at most; more than are used are dropped by `fill`.
        finetune: whether the keys are trained.
    """

    def __init__(
        self, width: int, classes: int, *, scale: Tensor, keys: int, finetune: bool
    ) -> None:
        super().__init__(width, classes, scale=scale)
        self.keys = nn.Parameter(torch.zeros(keys, width), requires_grad=finetune)
        self.owners: Tensor
        self.alpha: Tensor
        self.beta: Tensor
        self.register_buffer("owners", torch.zeros(keys, dtype=torch.int64))
        self.register_buffer("alpha", torch.tensor(0.0))
        self.register_buffer("beta", torch.tensor(BETA))

    @torch.no_grad()
    def fill(self, keys: Tensor, owners: Tensor) -> None:
        """Takes keys (K, E) of any length and their classes (K,)."""
        like = self.keys
        self.keys = nn.Parameter(unit(keys.to(like)), requires_grad=like.requires_grad)
        self.owners = owners.to(like.device)

    def forward(self, features: Tensor, weight: Tensor | None = None) -> Tensor:
        f = unit(features)
        logits = self.zero_shot(f, self.weight if weight is None else weight)
        with torch.autocast(f.device.type, enabled=False):
            cached = cache_logits(f @ self.keys.T, self.values(), self.beta)
            return logits + self.alpha * cached

    def values(self) -> Tensor:
        """V, (K, C)."""
        return F.one_hot(self.owners, len(self.weight)).to(self.keys)


def cache_logits(affinity: Tensor, values: Tensor, beta: Tensor | float) -> Tensor:
    """exp(-β (1 - A)) V of affinities A (B, K) and values V (K, C): (B, C)."""
    return (beta * (affinity - 1)).exp() @ values

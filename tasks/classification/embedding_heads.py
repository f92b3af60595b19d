"""Heads that compare an image's embedding with those of class names and of pictures.

Shape legend: B images, E width of the shared space, C classes, K keys of a cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALPHA, BETA = 1.0, 5.5  # Tip-Adapter's weights before the search (section 4.4 of the paper)


def unit(features: Tensor) -> Tensor:
    """Returns features (B, E) at unit length, in float32 or wider."""
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.normalize(features, dim=-1)


class ZeroShotHead(nn.Module):
    """CLIP's zero-shot classifier: s f Wᵀ of unit vectors f and W (C, E).

    It has no parameters. Source: Radford et al. 2021, section 3.1.

    Args:
        width: E.
        classes: C.
        scale: s, the encoder's inverse temperature.

    Attributes:
        current: whether W belongs to the text tower in its present state.
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
        """Returns logits (B, C) in float32.

        Args:
            features: (B, E) of the encoder, of any length.
            weight: (C, E), in place of the stored W.
        """
        return self.zero_shot(unit(features), self.weight if weight is None else weight)

    def zero_shot(self, f: Tensor, weight: Tensor) -> Tensor:
        """Returns s f Wᵀ (B, C) of unit vectors f (B, E) and W (C, E)."""
        with torch.autocast(f.device.type, enabled=False):
            return self.scale * f @ weight.T


def _loaded(head: nn.Module, keys: object) -> None:
    assert isinstance(head, ZeroShotHead)
    head.current = True


class TipAdapterHead(ZeroShotHead):
    """Tip-Adapter: s f Wᵀ + α exp(-β (1 - f Kᵀ)) V, with keys K and their one-hot classes V.

    Until there are keys, α is 0 and the head is the zero-shot classifier. Keys have unit length.
    Keys that are trained (Tip-Adapter-F) start at unit length and may leave it, as in the authors'
    code. Source: Zhang et al. 2022, eqs. 4-6.

    Args:
        width: E.
        classes: C.
        scale: s, the encoder's inverse temperature.
        keys: K, the most keys; `fill` removes those that are not used.
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
        """Sets the keys.

        Args:
            keys: (K, E), of any length.
            owners: (K,) the class of each key.
        """
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
        """Returns V, (K, C)."""
        return F.one_hot(self.owners, len(self.weight)).to(self.keys)


def cache_logits(affinity: Tensor, values: Tensor, beta: Tensor | float) -> Tensor:
    """Returns exp(-β (1 - A)) V, (B, C), of affinities A (B, K) and values V (K, C)."""
    return (beta * (affinity - 1)).exp() @ values

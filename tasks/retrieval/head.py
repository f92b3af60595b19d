"""The head of retrieval: layers on the embeddings, temperature and bias.

Shape legend: B images or texts, E width of the shared space.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import RetrievalHeadConfig

MAX_LOGIT_SCALE = math.log(100)  # CLIP's limit (Radford et al. 2021, §2.5)


class Residual(nn.Module):
    """u -> u + A(u) of unit vectors (B, E), where A is linear, or E -> E/r -> E with ReLU.

    A(u) is 0 at first. In this it differs from CLIP-Adapter (Gao et al. 2021, eq. 3), which mixes
    0.2·A(f) + 0.8·f and so changes the embeddings from the beginning.

    Args:
        width: E.
        hidden: E/r; None for a linear A.
    """

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        self.down = None if hidden is None else nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width if hidden is None else hidden, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, u: Tensor) -> Tensor:
        return u + self.up(u if self.down is None else F.relu(self.down(u)))


class RetrievalHead(nn.Module):
    """Turns embeddings of the encoder into unit vectors, and holds the temperature of their logits.

    Args:
        width: E.
        config: of the head.
        logit_scale: of the encoder, as a logarithm; it is copied.
        logit_bias: the first value of the sigmoid loss's bias; None for a loss without bias.
        itm_head: BLIP's last layer of image-text matching, which is copied; None without matching.
    """

    def __init__(
        self,
        width: int,
        config: RetrievalHeadConfig,
        *,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        itm_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.image: nn.Module = nn.Identity()
        self.text: nn.Module = nn.Identity()
        if config.projection != "none":
            hidden = max(1, width // config.reduction)
            size = hidden if config.projection == "bottleneck" else None
            self.image, self.text = Residual(width, size), Residual(width, size)
        self.logit_scale = _scalar(logit_scale.clamp(max=MAX_LOGIT_SCALE), config.learn_temperature)
        self.logit_bias = None if logit_bias is None else _scalar(logit_bias, True)
        self.itm_head = copy.deepcopy(itm_head)
        if self.itm_head is not None:
            self.itm_head.requires_grad_(True)

    def images(self, features: Tensor) -> Tensor:
        """Returns the encoder's image embeddings (B, E) as float32 of unit length."""
        return _unit(self.image, features)

    def texts(self, features: Tensor) -> Tensor:
        """Returns the encoder's text embeddings (B, E) as float32 of unit length."""
        return _unit(self.text, features)

    @property
    def scale(self) -> Tensor:
        """The inverse temperature, at most 100.

        The parameter itself is clamped. If only its use were clamped, it would get no gradient
        beyond the limit and could not come back.
        """
        with torch.no_grad():
            self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return self.logit_scale.exp()


def _scalar(value: Tensor, trained: bool) -> nn.Parameter:
    # At least float32, whatever the encoder's type is.
    value = value.detach().clone().reshape(())
    dtype = torch.promote_types(value.dtype, torch.float32)
    return nn.Parameter(value.to(dtype), requires_grad=trained)


def _unit(change: nn.Module, features: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.normalize(change(F.normalize(features, dim=-1)), dim=-1)

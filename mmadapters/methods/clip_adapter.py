"""CLIP-Adapter: a bottleneck on the embedding of a tower in the space shared with another one.

For an embedding f (B, E), projected and not yet of unit length,

    f' = a A(f) + (1 - a) f,    A(f) = relu(U relu(D f))

with D (E/4 x E) and U (E x E/4) without biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.acting import Context
from ..sites.sitemap import Embedding, SiteMap, Tower
from .base import AdapterModule, Branch, MethodConfig
from .init import kaiming
from .select import check_count, check_number


@dataclass(frozen=True, kw_only=True)
class CLIPAdapterConfig(MethodConfig):
    """CLIP-Adapter, Gao et al. 2021 (arXiv 2110.04544), eqs. 1-6: on the image's embedding.

    Both maps start at random, as in the authors' code. So a fresh adapter is not the identity: it
    mixes a random embedding, with weight a, into the frozen one.

    It acts where the embedding of a tower is computed. The tower's tokens are unchanged.
    """

    # a, the weight of the adapted embedding, above 0 to 1: 0.2 in the paper's code. The paper
    # searches it for each data set.
    ratio: float = 0.2
    # E over the width of the bottleneck, a whole number from 1 to E.
    reduction_factor: int = 4
    # The towers whose embeddings change, at least one. The paper found the image's alone best.
    towers: tuple[str, ...] = ("vision",)

    method: ClassVar[str] = "clip_adapter"
    identity: ClassVar[bool] = False
    mergeable: ClassVar[bool | str] = (
        "a CLIP-Adapter has non-linearities behind its maps, so no weight equals it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ratio", self.ratio)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, not {self.ratio!r}")
        check_count("reduction_factor", self.reduction_factor)
        if isinstance(self.towers, str):
            raise ValueError(f"towers must be a tuple of names, e.g. towers=({self.towers!r},)")
        object.__setattr__(self, "towers", tuple(self.towers))
        if not self.towers:
            raise ValueError("towers is empty: name at least one, e.g. ('vision',)")

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        selection = sites.select(self.sites)
        embeddings = [self._embedding(sites, name) for name in dict.fromkeys(self.towers)]
        chosen = [embedding for embedding in embeddings if embedding.name in selection]
        if not chosen:
            raise ValueError(
                f"no embedding of towers={self.towers!r} lies under sites={self.sites!r}; "
                f"{self.method} acts at {', '.join(e.name for e in embeddings)}"
            )
        return {embedding.name: CLIPAdapter(self, embedding) for embedding in chosen}

    def _embedding(self, sites: SiteMap, name: str) -> Embedding:
        tower = sites.towers.get(name)
        if tower is None:
            raise ValueError(
                f"{self.method} acts on the embedding of tower {name!r}, which "
                f"{sites.architecture} lacks; it has {', '.join(sites.towers)}"
            )
        if tower.embedding is None:
            raise ValueError(
                f"{self.method} cannot enter tower {name!r} of {sites.architecture}: "
                f"{_reason(tower)}"
            )
        return tower.embedding


def _reason(tower: Tower) -> str:
    return tower.unembedded or (
        "it gives no embedding into a space shared with another tower; CLIP and SigLIP models do"
    )


class CLIPAdapter(Branch):
    """Acts on (B, E) instead of (B, N, D). Parameters of `down` (h, E) and `up` (E, h)."""

    def __init__(self, config: CLIPAdapterConfig, embedding: Embedding) -> None:
        super().__init__()
        like, width = embedding.like(), embedding.width
        hidden = width // config.reduction_factor
        if hidden < 1:
            raise ValueError(
                f"reduction_factor={config.reduction_factor} leaves nothing of the {width} "
                f"numbers at {embedding.name}; take at most {width}"
            )
        self.ratio = config.ratio
        self.down = nn.Linear(width, hidden, bias=False, **like)
        self.up = nn.Linear(hidden, width, bias=False, **like)
        kaiming(self.down.weight)
        kaiming(self.up.weight)

    def change(self, branch: Tensor, context: Context) -> Tensor:
        adapted = F.relu(self.up(F.relu(self.down(branch))))
        return self.ratio * (adapted.to(branch.dtype) - branch)

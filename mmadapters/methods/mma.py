"""MMA: adapters of both towers' top blocks that meet in a shared middle.

    u' = u + s U ReLU(M ReLU(D n + b) + c)        u: the feed-forward part's branch

n is the input of the block's self-attention: the block's input behind its first LayerNorm. Every
block has D (r, D) and U (D, r) of its own. M (r, r) and its bias are shared by one block of each
tower: the towers' last blocks, those before, and so on. U has a bias. Yang et al. 2024, section
3.2; their adapters are in blocks 5 to 12 of the 12 of ViT-B/16 and of its text tower, with
s = 0.001.

Where ours differs from the authors' code:
- U starts at zero, for a fresh adapter to be the identity; they start it as D and M.
- The gradient of an adapter's parameters has the factor s, which they divide out. Steps of Adam and
  AdamW are the same with and without it; for SGD, multiply the learning rate by 1/s.
- Towers of different depth are paired from the top.
- In a post-norm block (BERT in open_clip, BLIP's text), n is the block's input itself, and the
  result is added before the block's last LayerNorm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.acting import Context
from ..sites.sitemap import SiteMap, Sublayer, Tower
from .base import AdapterModule, Branch, MethodConfig
from .init import zero_linear
from .select import check_count, check_scale, chosen_sublayers

TOWERS = ("vision", "text")


@dataclass(frozen=True, kw_only=True)
class MMAConfig(MethodConfig):
    """MMA, Yang et al. 2024."""

    # r, the width of the bottleneck in channels, at least 1.
    size: int = 32
    # s, a factor on the result, not 0.
    scale: float = 0.001
    # The number of the lowest adapted block, from 0, in the tower that has fewer blocks; the other
    # tower has as many adapted blocks. None leaves out the lower third, as in the paper.
    lowest: int | None = None

    method: ClassVar[str] = "mma"
    mergeable: ClassVar[bool | str] = (
        "a bottleneck has a non-linearity between its projections, so no weight equals it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("size", self.size)
        check_scale(self.scale)
        lowest = self.lowest
        if lowest is not None and (
            isinstance(lowest, bool) or not isinstance(lowest, int) or lowest < 0
        ):
            raise ValueError(f"lowest must be the number of a block from 0 on, not {lowest!r}")

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        towers = _both(sites)
        count = self._count(towers)
        chosen = {sublayer.name for sublayer in chosen_sublayers(self, sites, ("ffn",))}
        middles: dict[int, nn.Linear] = {}
        built: dict[str, AdapterModule] = {}
        for tower in towers:
            for block in tower.blocks[-count:]:
                ffn, layer = block.sublayers["ffn"], len(tower.blocks) - block.index
                if ffn.name not in chosen:
                    continue
                if layer not in middles:
                    middles[layer] = _started(nn.Linear(self.size, self.size, **ffn.like()))
                built[ffn.name] = MMA(self, ffn, middles[layer])
        if not built:
            raise ValueError(
                f"mma adapts the upper {count} blocks of both towers of {sites.architecture}, and "
                f"sites={self.sites!r} names none of them: set lowest"
            )
        return built

    def _count(self, towers: list[Tower]) -> int:
        """Returns the number of adapted blocks in each tower."""
        depth = min(len(tower.blocks) for tower in towers)
        lowest = depth // 3 if self.lowest is None else self.lowest
        if lowest >= depth:
            raise ValueError(
                f"lowest={lowest} leaves no block: a tower has {depth}, numbered from 0 to "
                f"{depth - 1}"
            )
        return depth - lowest


def _both(sites: SiteMap) -> list[Tower]:
    missing = [name for name in TOWERS if name not in sites.towers]
    if missing:
        raise ValueError(
            f"mma couples the blocks of an image tower with those of a text tower, and "
            f"{sites.architecture} has no tower {missing[0]!r}: take an image-text encoder (CLIP, "
            "SigLIP), or adaptformer for one tower"
        )
    return [sites.towers[name] for name in TOWERS]


def _started(linear: nn.Linear) -> nn.Linear:
    """Fills a linear map as the authors do, and returns it."""
    nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(linear.bias)
    return linear


class MMA(Branch):
    """The adapter of one block.

    Parameters of `down` (r, D), `middle` (r, r), which is shared, and `up` (D, r), with biases.
    """

    reads = frozenset({"attended"})

    def __init__(self, config: MMAConfig, sublayer: Sublayer, middle: nn.Linear) -> None:
        super().__init__()
        like = sublayer.like()
        self.scale = config.scale
        self.down = _started(nn.Linear(sublayer.width, config.size, **like))
        self.middle = middle
        self.up = zero_linear(config.size, sublayer.width, like)

    def change(self, branch: Tensor, context: Context) -> Tensor:
        assert context.attended is not None
        inner = F.relu(self.middle(F.relu(self.down(context.attended))))
        return (self.scale * self.up(inner)).to(branch.dtype)

"""Visual prompt tuning: learned tokens beside those of the image.

    shallow   [x, P] enters the first block; P's outputs enter the next ones behind the tokens
    deep      [x, P_i] enters block i; P_i's outputs are removed after it

Jia et al. 2022. In both forms the outputs of blocks have no prompts for all that read them. Our
tokens stand at the end, theirs behind the class token; this changes nothing for attention with
absolute positions. A fresh prompt is not the identity: it always takes some attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..sites.sitemap import SiteMap, Tower
from .base import AdapterModule, MethodConfig, Prompt
from .select import check_count


@dataclass(frozen=True, kw_only=True)
class PromptConfig(MethodConfig):
    """Visual prompt tuning, Jia et al. 2022.

    `add_adapter` raises ValueError for towers whose positions or masks fix the sequence's length.
    """

    # P, the number of tokens for a block, at least 1.
    length: int = 10
    # True: every block has tokens of its own. False: one set of tokens enters the first block.
    deep: bool = True

    method: ClassVar[str] = "prompt"
    identity: ClassVar[bool] = False
    mergeable: ClassVar[bool | str] = "a prompt adds tokens, which no weight can hold"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("length", self.length)

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        selection = sites.select(self.sites)
        built: dict[str, AdapterModule] = {}
        for tower in sites.towers.values():
            chosen = [block for block in tower.blocks if block.name in selection]
            if chosen and tower.prompts is not None:
                able = [name for name, other in sites.towers.items() if other.prompts is None]
                hint = "; image towers with absolute positions can take it"
                if able:
                    hint = f"; name sites=({able[0]!r},)"
                raise ValueError(
                    f"prompt tuning cannot enter tower {tower.name!r} of {sites.architecture}: "
                    f"{tower.prompts}{hint}"
                )
            for block in chosen if self.deep else tower.blocks[:1] if chosen else ():
                built[block.name] = Tokens(self, tower)
        if not built:
            raise ValueError(f"no block of {sites.architecture} lies under sites={self.sites!r}")
        return built


class Tokens(Prompt):
    """The prompt of one block. Parameter `tokens` (P, D)."""

    def __init__(self, config: PromptConfig, tower: Tower) -> None:
        super().__init__()
        like = next(iter(tower.blocks[0].sublayers.values())).like()
        self.count, self.replaces = config.length, config.deep
        bound = (3 / tower.width) ** 0.5
        tokens = torch.empty(config.length, tower.width, **like).uniform_(-bound, bound)
        self.tokens = nn.Parameter(tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens.to(x.dtype).expand(x.shape[0], -1, -1)

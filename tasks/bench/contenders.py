"""One encoder as each library adapts it, with the same few methods.

Adapters get random values, since fresh ones may take shortcuts that trained ones do not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mmadapters
from mmadapters import (
    BottleneckConfig,
    DoubleSeqBnConfig,
    LoRAConfig,
    ParallelPlacement,
    Route,
    SeqBnConfig,
)
from mmadapters.sites.tables import describe

from .cases import WIDER
from .encoders import Inputs
from .limits import first_block

RANK = 8
TARGETS = ("q", "k", "v")
SPREAD = 0.02


@dataclass(frozen=True, kw_only=True)
class Work:
    """The adapters to put on an encoder.

    Attributes:
        method: see `cases.Case`.
        size: bottleneck size.
        start: the first adapted block, see `limits.first_block`.
        adapters: number of adapters; the first is active.
        mixed: the adapter of each row of a batch; empty if all rows use the first one.
    """

    method: str
    size: int
    start: str = "0"
    adapters: int = 1
    mixed: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Returns the names of the adapters."""
        return [f"a{index}" for index in range(self.adapters)]


class Contender(ABC):
    """An encoder with the adapters of one library, on its device and in its precision."""

    model: nn.Module

    def forward(self, inputs: Inputs) -> Any:
        """Returns the encoder's output with its adapters active."""
        return inputs(self.model)

    def train(self) -> None:
        """Sets train mode without changing which parameters are trainable."""
        self.model.train()

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Returns the trainable parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @abstractmethod
    def switch(self, name: str) -> None:
        """Activates another adapter."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the first adapter."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Loads the files of `save` as another adapter."""

    @abstractmethod
    def unload(self) -> None:
        """Deletes the adapter that `load` added."""


class Bare(Contender):
    """The encoder without adapters, frozen or, for full fine-tuning, trainable."""

    def __init__(self, encoder: nn.Module, work: Work) -> None:
        self.model = encoder.requires_grad_(work.method == "full").eval()

    def switch(self, name: str) -> None:
        raise ValueError("the bare encoder has no adapters")

    def save(self, folder: Path) -> None:
        raise ValueError("the bare encoder has no adapters")

    load = save

    def unload(self) -> None:
        raise ValueError("the bare encoder has no adapters")


class Ours(Contender):
    """An encoder with adapters of this library."""

    model: mmadapters.AdapterModel

    def __init__(self, encoder: nn.Module, work: Work) -> None:
        config = _config(work, encoder)
        self.model = mmadapters.init(encoder)
        for name in work.names:
            self.model.add_adapter(name, config)
        randomise(list(self.model.adapters.parameters()))
        self.model.train_adapter("a0")
        self.model.eval()
        self.route = Route(list(work.mixed)) if work.mixed else None

    def forward(self, inputs: Inputs) -> Any:
        if self.route is None:
            return inputs(self.model)
        with self.model.using(self.route):
            return inputs(self.model)

    def switch(self, name: str) -> None:
        self.model.set_active_adapters(name)

    def save(self, folder: Path) -> None:
        self.model.save_adapter(folder, "a0")

    def load(self, folder: Path) -> None:
        self.model.load_adapter(folder, "loaded")

    def unload(self) -> None:
        self.model.delete_adapter("loaded")


class MergedContender(Bare):
    """An encoder with an adapter of ours merged into its weights, detached as for serving."""

    def __init__(self, encoder: nn.Module, work: Work) -> None:
        ours = Ours(encoder, work)
        try:
            ours.model.merge_adapter("a0")
        except ValueError:
            config = ours.model.adapter("a0").config
            if not isinstance(config, BottleneckConfig):
                raise
            # Merging failed, since the feed-forward parts have CLIP's activation.
            ours.model.delete_adapter("a0")
            ours.model.add_adapter("a0", replace(config, activation="quick_gelu"))
            randomise(list(ours.model.adapters.parameters()))
            ours.model.merge_adapter("a0")
        super().__init__(ours.model.detach(), work)


def _config(work: Work, encoder: nn.Module) -> mmadapters.MethodConfig:
    sites = _sites(work.start, encoder)
    if work.method.startswith("lora"):
        return LoRAConfig(rank=RANK, targets=TARGETS, sites=sites)
    if work.method == WIDER:
        beside = ParallelPlacement(input="normed")
        return BottleneckConfig(
            placement=beside, size=2 * work.size, activation="gelu", sites=sites
        )
    bottlenecks: dict[str, type[BottleneckConfig]] = {
        "double_seq_bn": DoubleSeqBnConfig,
        "seq_bn": SeqBnConfig,
    }
    return bottlenecks[work.method](size=work.size, sites=sites)


def _sites(start: str, encoder: nn.Module) -> tuple[str, ...]:
    """Returns the names of the blocks from `start` on, of every tower."""
    towers = describe(encoder)[0].towers.values()
    return tuple(
        block.name
        for tower in towers
        for block in tower.blocks[first_block(start, len(tower.blocks)) :]
    )


@torch.no_grad()
def randomise(parameters: Sequence[nn.Parameter]) -> None:
    """Adds random values to adapters; the same shapes in the same order get the same values."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        change = SPREAD * torch.randn(parameter.shape, generator=generator)
        parameter.add_(change.to(parameter.device, parameter.dtype))

"""What each process of a test of data-parallel training runs; it imports no more than it needs."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from families.small import randomise, small_vit
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mmadapters
from mmadapters import AdapterModel, ConfigUnion, LoRAConfig, SeqBnConfig


def small_model() -> AdapterModel:
    """The same weights in every process; adapter `a` is trainable."""
    torch.manual_seed(0)
    model = mmadapters.init(small_vit())
    model.add_adapter("a", ConfigUnion(LoRAConfig(rank=4), SeqBnConfig(reduction_factor=2)))
    randomise(model.adapter("a"), std=0.05)
    model.train_adapter("a")
    return model


def gradients(model: nn.Module, adapter: nn.Module, images: Tensor) -> dict[str, Tensor]:
    model(images).square().mean().backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}


def worker(rank: int, address: str, images: Tensor, results: Path) -> None:
    """Saves the gradients that arrive in the process of this rank, of half of the images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        model = small_model()
        own = gradients(DistributedDataParallel(model), model.adapter("a"), images.chunk(2)[rank])
        torch.save(own, results / f"{rank}.pt")
    finally:
        dist.destroy_process_group()

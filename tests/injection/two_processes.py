"""What each process of a test of data-parallel training runs; it imports no library of models."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mmadapters
from mmadapters import (
    AdapterModel,
    Architecture,
    ConfigUnion,
    LoRAConfig,
    SeqBnConfig,
    SublayerSpec,
    TowerSpec,
)

WIDTH = 16


class Block(nn.Module):
    """A pre-norm block around `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        n = self.ln_1(x)
        x = x + self.attn(n, n, n, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


ATTN = SublayerSpec(
    output="attn",
    residual="ln_1",
    attention="attn",
    norm="ln_1",
    leaves={
        **{role: f"attn.in_proj_weight[{index}/3]" for index, role in enumerate("qkv")},
        "o": "attn.out_proj.weight",
    },
)
FFN = SublayerSpec(
    output="mlp", residual="ln_2", norm="ln_2", leaves={"up": "mlp.0", "down": "mlp.2"}
)
SITES = Architecture(
    towers=(TowerSpec(name="vision", blocks="blocks", sublayers={"attn": ATTN, "ffn": FFN}),)
)


def small_model() -> AdapterModel:
    """The same weights in every process; adapter `a` is trainable."""
    torch.manual_seed(0)
    example = (torch.randn(2, 5, WIDTH),)
    model = mmadapters.init(Encoder(), sites=SITES, example_inputs=example)
    targets = ("q", "v", "o", "down")
    model.add_adapter(
        "a", ConfigUnion(LoRAConfig(rank=4, targets=targets), SeqBnConfig(reduction_factor=2))
    )
    with torch.no_grad():
        for parameter in model.adapter("a").parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.train_adapter("a")
    return model


def gradients(model: nn.Module, adapter: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the mean square of what the model gives for x (B, N, D)."""
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}


def worker(rank: int, address: str, x: Tensor, results: Path) -> None:
    """Saves the gradients that arrive in the process of this rank, of half of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        model = small_model()
        own = gradients(DistributedDataParallel(model), model.adapter("a"), x.chunk(2)[rank])
        torch.save(own, results / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
